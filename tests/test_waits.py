"""Every wait whose call has no bound is in docs/waits.md, with what bounds it and what the user reads.

Waits are found by their names in the source. One that is called something else is not found.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACE = re.compile(r"`([\w/]+\.py)(?:: ([\w.]+))?`")
UNLESS_TIMED = {"wait", "join", "result", "communicate", "acquire", "get"}  # methods, with no argument
FOR_THE_DEVICE = {"synchronize", "item", "tolist", "cpu", "empty_cache", "mem_get_info"}
CALLS = re.compile(
    r"(torch\.distributed|dist)\.(?!is_|get_|isend|irecv|TCPStore)\w+|torch\.cuda\.graph|(fcntl\.)?flock|select\.select"
    r"|subprocess\.(run|call|check_call|check_output)|ThreadPoolExecutor|sys\.stdin\..*"
)
OURS = re.compile(r"(runner|steps)\.synchronize|(pending|launched|copy|fetch\(.*\)|Fetch\(.*\)|submit\(.*\))\.wait$")


def has_no_bound(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    _, dot, method = name.rpartition(".")
    timed = any(word.arg == "timeout" for word in call.keywords)
    if OURS.search(name) or timed:
        return False
    waits = method in FOR_THE_DEVICE or (method in UNLESS_TIMED and not call.args)
    return bool(dot and waits) or CALLS.fullmatch(name) is not None


def functions(tree: ast.AST, outer: str = "") -> Iterator[tuple[str, list[ast.Call]]]:
    """Every function's qualified name, and its calls; "" for those outside of all."""
    calls, nodes = [], list(ast.iter_child_nodes(tree))
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield from functions(node, f"{outer}.{node.name}".lstrip("."))
            continue
        calls += [node] if isinstance(node, ast.Call) else []
        nodes += ast.iter_child_nodes(node)
    yield outer, calls


def waits_in(source: str) -> set[str]:
    """The functions that have such a wait."""
    return {name for name, calls in functions(ast.parse(source)) if any(map(has_no_bound, calls))}


def documented() -> set[tuple[str, str]]:
    """(file, function), or (file, "") for all of a file."""
    return set(PLACE.findall((ROOT / "docs" / "waits.md").read_text()))


def test_every_wait_is_on_the_page():
    known = documented()
    files = [file for folder in ("tokenweave", "perf", "launch") for file in sorted((ROOT / folder).rglob("*.py"))]
    found = [(str(file.relative_to(ROOT)), name) for file in files for name in sorted(waits_in(file.read_text()))]
    assert len(found) > 30
    missing = [f"{file}: {name}" for file, name in found if not {(file, name), (file, "")} & known]
    assert missing == [], "bound these waits (tokenweave/waiting.py), or say in docs/waits.md what does"


def test_all_on_the_page_is_there():
    for file, name in documented():
        source = (ROOT / file).read_text()
        assert not name or name in dict(functions(ast.parse(source))), f"docs/waits.md: {file} has no {name}"


@pytest.mark.parametrize(
    "line",
    [
        "torch.cuda.synchronize()",
        "stream.synchronize()",
        "self.end.synchronize()",
        "event.wait()",
        "work.wait()",
        "thread.join()",
        "future.result()",
        "queue.get()",
        "process.communicate()",
        "lock.acquire()",
        "x.sum().item()",
        "y = [x.cpu() for x in logits]",
        "dist.barrier()",
        "torch.distributed.all_reduce(x)",
        "dist.destroy_process_group(group)",
        "subprocess.run(command)",
        "sys.stdin.buffer.read(1)",
        "if True:\n        with torch.cuda.graph(graph):\n            run()",
    ],
)
def test_waits_are_found(line):
    assert waits_in(f"class A:\n  def b(self):\n    {line}") == {"A.b"}


@pytest.mark.parametrize(
    "line",
    [
        "thread.join(3.0)",
        "', '.join(names)",
        "done.wait(timeout=3.0)",
        "subprocess.run(command, timeout=3)",
        "names.get('x')",
        "self.runner.synchronize()",
        "self.fetch().wait()",
        "request.submit(channel).wait()",
        "dist.get_rank()",
    ],
)
def test_what_has_a_bound_is_not(line):
    assert waits_in(f"def f():\n  {line}") == set()
