"""The real link: it is as asked for, and nothing of it is left, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from perf.overlap import netns

ROOT = Path(__file__).parents[3]
REASON = netns.refusal()
needs_namespaces = pytest.mark.skipif(bool(REASON), reason=f"no network namespaces here: {REASON}")
SERVER = (
    "import socket; s = socket.create_server(('{}', 7000)); print('up', flush=True); s.accept()[0].sendall(b'hello')"
)
CLIENT = "import socket; print(socket.create_connection(('{}', 7000), 10).recv(5).decode())"
HOLDER = """
import time
from perf.overlap.netns import joined
with joined(100) as ends:
    print(*(end.pid for end in ends), flush=True)
    time.sleep(60)
"""


def inside(end: netns.Namespace, *command: str) -> str:
    return subprocess.run([*end.enter, *command], capture_output=True, text=True, timeout=20, check=True).stdout


def gone(pids: list[int]) -> bool:
    """Waits, bounded, since a process that was told to end takes a moment."""
    deadline_s = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def host_interfaces() -> str:
    return subprocess.run(["ip", "-oneline", "link"], capture_output=True, text=True, timeout=20).stdout


@needs_namespaces
def test_the_link_is_as_asked_for_and_carries_bytes():
    with netns.joined(123) as ends:
        spaces = {os.readlink(f"/proc/{end.pid}/ns/net") for end in ends}
        assert len(spaces | {os.readlink("/proc/self/ns/net")}) == 3
        for end in ends:
            assert f"mtu {netns.MTU}" in inside(end, "ip", "link", "show", netns.INTERFACE)
            shape = inside(end, "tc", "qdisc", "show", "dev", netns.INTERFACE)
            assert "tbf" in shape
            assert "rate 123Mbit" in shape
        assert netns.INTERFACE not in host_interfaces()
        first, second = ends
        program = SERVER.format(first.address)
        with subprocess.Popen([*first.enter, sys.executable, "-c", program], stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == b"up\n"
            assert inside(second, sys.executable, "-c", CLIENT.format(first.address)) == "hello\n"
    assert gone([end.pid for end in ends])


@needs_namespaces
def test_more_than_two_ends_are_joined_and_shaped():
    with netns.joined(123, 3) as ends:
        assert len({os.readlink(f"/proc/{end.pid}/ns/net") for end in ends}) == 3
        for end in ends:
            assert "rate 123Mbit" in inside(end, "tc", "qdisc", "show", "dev", netns.INTERFACE)
        program = SERVER.format(ends[0].address)
        for other in ends[1:]:
            with subprocess.Popen([*ends[0].enter, sys.executable, "-c", program], stdout=subprocess.PIPE) as server:
                assert server.stdout is not None
                assert server.stdout.readline() == b"up\n"
                assert inside(other, sys.executable, "-c", CLIENT.format(ends[0].address)) == "hello\n"
        assert netns.BRIDGE not in host_interfaces()
    assert gone([end.pid for end in ends])


@needs_namespaces
def test_an_error_takes_it_down():
    pids: list[int] = []
    with pytest.raises(ZeroDivisionError), netns.joined(100) as ends:
        pids += [end.pid for end in ends]
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
        raise ZeroDivisionError
    assert gone(pids)


@needs_namespaces
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_takes_it_down(number):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT
    ) as it:
        assert it.stdout is not None
        pids = [int(pid) for pid in it.stdout.readline().split()]
        assert len(pids) == 2
        it.send_signal(number)
    assert it.returncode != 0
    assert gone(pids)
    assert netns.INTERFACE not in host_interfaces()


@needs_namespaces
def test_a_link_that_cannot_be_shaped_is_refused_and_taken_down():
    with pytest.raises(netns.NetworkRefused, match="tc qdisc add"), netns.joined(0):
        pass


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(netns.shutil, "which", lambda name: None if name == "tc" else f"/bin/{name}")
    assert netns.refusal() in ("not installed: tc (package iproute2)", "network namespaces exist on Linux only")


def test_a_kernel_that_forbids_it_is_reported_and_paced_is_offered(monkeypatch, capsys):
    from perf.overlap import __main__ as command

    monkeypatch.setattr(netns, "refusal", lambda ranks: "unshare: unshare failed: Operation not permitted")
    monkeypatch.setattr(netns, "become_root_of_a_user_namespace", lambda argv, user: None)
    assert command.main(["--quick"]) == 2
    said = capsys.readouterr().err
    assert "Operation not permitted" in said
    assert "--link paced" in said
    assert "simulated" in said
