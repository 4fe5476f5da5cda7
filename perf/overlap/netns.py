"""Namespaces: two network namespaces joined by a shaped veth pair: a real, slow link on one machine.

A namespace has no name and no file: it lives as long as its keeper, a `cat` whose input this process holds open.
However this process ends, SIGKILL included, the keepers read the end of their input and go, and with them the
namespaces, the veth pair and its shaping. The host's own network is never touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

PROGRAMS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
}
INTERFACE = "link0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")  # inside the namespaces, which nothing else can reach
MTU = 65000  # at 1500 gloo burns a core on small packets, and nothing can be hidden
BURST, LATENCY = "256kb", "100ms"
COMMAND_TIMEOUT_S = 20
KEEPER = "echo ready; exec cat >/dev/null"


class NetworkRefused(RuntimeError):
    """This machine does not let us make namespaces, or shape a link between them."""


@dataclass(frozen=True)
class Namespace:
    """One of the two ends. address: of its end of the link."""

    pid: int  # of its keeper
    address: str

    @property
    def enter(self) -> list[str]:
        """What to put before a command to run it in here."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net"]


@contextmanager
def joined(mbit_per_s: float) -> Iterator[tuple[Namespace, Namespace]]:
    """Two namespaces whose link carries so much in each direction, for as long as the block runs.

    Raises NetworkRefused where the kernel, or a missing program, forbids it.
    """
    with ExitStack() as stack:
        first, second = (stack.enter_context(namespace(address)) for address in ADDRESSES)
        run(*first.enter, "ip", "link", "add", INTERFACE, "mtu", str(MTU), "type", "veth",
            "peer", "name", INTERFACE, "mtu", str(MTU), "netns", str(second.pid))  # fmt: skip
        for end in (first, second):
            bring_up(end, mbit_per_s)
        yield first, second


def bring_up(end: Namespace, mbit_per_s: float) -> None:
    run(*end.enter, "ip", "link", "set", "lo", "up")
    run(*end.enter, "ip", "address", "add", f"{end.address}/24", "dev", INTERFACE)
    run(*end.enter, "ip", "link", "set", INTERFACE, "up")
    rate = f"{round(mbit_per_s * 1000)}kbit"
    shape = ["tbf", "rate", rate, "burst", BURST, "latency", LATENCY]
    run(*end.enter, "tc", "qdisc", "add", "dev", INTERFACE, "root", *shape)


@contextmanager
def namespace(address: str) -> Iterator[Namespace]:
    """A fresh network namespace and its keeper. It gets a session of its own, or Ctrl-C would end it too early."""
    pipe = subprocess.PIPE
    command = ["unshare", "--net", "sh", "-c", KEEPER]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True) as keeper:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        assert keeper.stderr is not None
        try:
            if keeper.stdout.readline() != b"ready\n":  # until then it still is in the host's namespace
                raise NetworkRefused(keeper.stderr.read().decode().strip() or "unshare gave no reason")
            yield Namespace(keeper.pid, address)
        finally:
            keeper.stdin.close()


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    if done.returncode:
        raise NetworkRefused(f"`{' '.join(command)}` said: {done.stderr.strip() or f'exit code {done.returncode}'}")


def refusal(mbit_per_s: float = 1000.0) -> str:
    """Why there can be no real link here, found by making one; "" if there can."""
    if sys.platform != "linux":
        return "network namespaces exist on Linux only"
    if lacking := [f"{name} (package {package})" for name, package in PROGRAMS.items() if not shutil.which(name)]:
        return f"not installed: {', '.join(lacking)}"
    try:
        with joined(mbit_per_s):
            return ""
    except NetworkRefused as error:
        return str(error)


def become_root_of_a_user_namespace(argv: list[str], user: str) -> None:
    """Start this program again under `unshare -Ur`, where it may make network namespaces; the variable `user`
    then has the user's own id. Returns only if it need not, or where the kernel forbids it."""
    if os.geteuid() == 0 or not shutil.which("unshare"):
        return
    if subprocess.run(["unshare", "-Ur", "true"], capture_output=True, timeout=COMMAND_TIMEOUT_S).returncode == 0:
        environment = os.environ | {user: str(os.getuid())}
        os.execvpe("unshare", ["unshare", "-Ur", sys.executable, "-m", "perf.overlap", *argv], environment)
