"""Namespaces: network namespaces joined by shaped veth pairs: a real, slow link on one machine. Two ends are joined
by one pair; more by a pair each to a bridge, in a namespace of its own.

A namespace has no name and no file: it lives as long as its keeper, a `cat` whose input this process holds open.
However this process ends, SIGKILL included, the keepers read the end of their input and go, and with them the
namespaces, the veth pairs and their shaping. The host's own network is never touched.
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
NETWORK = "10.77.0"  # inside the namespaces, which nothing else can reach
MOST_ENDS = 64
BRIDGE = "switch0"
MTU = 65000  # at 1500 gloo burns a core on small packets, and nothing can be hidden
BURST, LATENCY = "256kb", "100ms"
COMMAND_TIMEOUT_S = 20
KEEPER = "echo ready; exec cat >/dev/null"


class NetworkRefused(RuntimeError):
    """This machine does not let us make namespaces, or shape a link between them."""


@dataclass(frozen=True)
class Namespace:
    """An end of the link, or the bridge between ends. address: of an end."""

    pid: int  # of its keeper
    address: str = ""

    @property
    def enter(self) -> list[str]:
        """What to put before a command to run it in here."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net"]


@contextmanager
def joined(mbit_per_s: float, count: int = 2) -> Iterator[list[Namespace]]:
    """Namespaces, each of which can send and receive so much, for as long as the block runs.

    Raises NetworkRefused where the kernel, or a missing program, forbids it.
    """
    with ExitStack() as stack:
        ends = [stack.enter_context(namespace(f"{NETWORK}.{i + 1}")) for i in range(count)]
        if count == 2:
            pair(ends[0], INTERFACE, ends[1], INTERFACE)
        else:
            switch(stack.enter_context(namespace()), ends, mbit_per_s)
        for end in ends:
            run(*end.enter, "ip", "link", "set", "lo", "up")
            run(*end.enter, "ip", "address", "add", f"{end.address}/24", "dev", INTERFACE)
            bring_up(end, INTERFACE, mbit_per_s)
        yield ends


def switch(hub: Namespace, ends: list[Namespace], mbit_per_s: float) -> None:
    """A bridge whose ports are shaped: what an end receives. The ends themselves shape what they send."""
    run(*hub.enter, "ip", "link", "add", BRIDGE, "mtu", str(MTU), "type", "bridge")
    run(*hub.enter, "ip", "link", "set", BRIDGE, "up")
    for i, end in enumerate(ends):
        pair(hub, f"port{i}", end, INTERFACE)
        run(*hub.enter, "ip", "link", "set", f"port{i}", "master", BRIDGE)
        bring_up(hub, f"port{i}", mbit_per_s)


def pair(first: Namespace, name: str, second: Namespace, peer: str) -> None:
    run(*first.enter, "ip", "link", "add", name, "mtu", str(MTU), "type", "veth",
        "peer", "name", peer, "mtu", str(MTU), "netns", str(second.pid))  # fmt: skip


def bring_up(end: Namespace, interface: str, mbit_per_s: float) -> None:
    run(*end.enter, "ip", "link", "set", interface, "up")
    rate = f"{round(mbit_per_s * 1000)}kbit"
    shape = ["tbf", "rate", rate, "burst", BURST, "latency", LATENCY]
    run(*end.enter, "tc", "qdisc", "add", "dev", interface, "root", *shape)


@contextmanager
def namespace(address: str = "") -> Iterator[Namespace]:
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


def refusal(count: int = 2) -> str:
    """Why there can be no real link between so many here, found by making one; "" if there can."""
    if sys.platform != "linux":
        return "network namespaces exist on Linux only"
    if lacking := [f"{name} (package {package})" for name, package in PROGRAMS.items() if not shutil.which(name)]:
        return f"not installed: {', '.join(lacking)}"
    try:
        with joined(1000.0, count):
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
