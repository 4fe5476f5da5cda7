"""CUDA graphs on a CPU, for tests: what was queued once runs again on the same memory, with the host numbers of the
first time. So any host number that a step depends on and its bucket does not hold shows as wrong tokens.

    with captured_runner(llm._runner) as capturer:     # from here on steps are captured
        ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tests.weave.streams import FakeStreams, NoteMode, Op, store
from tokenweave.comm.norm import Norm
from tokenweave.engine.attention import Backends
from tokenweave.engine.runner import Runner
from tokenweave.engine.tables import Tables
from tokenweave.models.attention import Options, Span
from tokenweave.models.rope import rotate
from tokenweave.weave.accesses import ByteRange, accesses, byte_range, storage_address, tensors_in
from tokenweave.weave.lanes import InlineLane
from tokenweave.weave.request import Rows
from tokenweave.weave.streams import StreamLane

READ_BY_HOST = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


@dataclass(frozen=True)
class Outside:
    """A tensor that was there before the capture. A graph knows its address, and does not keep it."""

    memory: StorageWeakRef
    like: tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]
    op: str

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.memory.cdata)
        if storage is None:
            raise AssertionError(f"memory that {self.op} uses was freed after the capture")
        dtype, size, stride, offset = self.like
        return torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)


class FakeCapturer:
    """A Capturer: notes the operators of the first time, and runs them again."""

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.streams = FakeStreams()  # of the runner whose steps are captured

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        ops: list[Op] = []
        with NoteMode(lambda *op: ops.append(Op("", "", *op))):
            run()
        self.captures += 1
        recording = Recording(ops)
        return lambda: self._replay(recording)

    def _replay(self, recording: Recording) -> None:
        self.replays += 1
        recording.replay()


class Recording:
    def __init__(self, ops: Sequence[Op]):
        inside: set[int] = set()
        self.ops = []
        for op in ops:
            check(op)
            given = {storage_address(tensor) for tensor in tensors_in([op.args, list(op.kwargs.values())])}
            self.ops.append(replace(op, args=outside(op.args, inside, op), kwargs=outside(op.kwargs, inside, op)))
            inside |= {storage_address(tensor) for tensor in tensors_in(op.result)} - (given - inside)

    def replay(self) -> None:
        """A message is waited for where its bytes are next touched, and at the end."""
        flying: list[tuple[Any, list[ByteRange]]] = []
        for op in self.ops:
            args, kwargs = present(op.args), present(op.kwargs)
            if not flying and op.func.namespace != "c10d":
                store(op.result, op.func(*args, **kwargs))
                continue
            reads, writes = accesses(op.func, args, kwargs, op.result)
            touched = [byte_range(tensor) for tensor in (*reads, *writes)]
            if op.func.namespace == "c10d":
                flying.append((op.func(*args, **kwargs), touched))
                continue
            wanted = [any(a.overlaps(b) for a in message for b in touched) for _, message in flying]
            for (returned, _), now in zip(flying, wanted, strict=True):
                if now:
                    finish(returned)
            flying = [one for one, now in zip(flying, wanted, strict=True) if not now]
            store(op.result, op.func(*args, **kwargs))
        for returned, _ in flying:
            finish(returned)


def check(op: Op) -> None:
    """A host that reads what the device has computed cannot be captured."""
    index = op.args[1] if op.func._opname == "index" else ()
    if op.func._opname in READ_BY_HOST or any(tensor.dtype == torch.bool for tensor in tensors_in(index)):
        raise AssertionError(f"{op.func} waits for the device: it cannot be captured")


def outside(value: Any, inside: set[int], op: Op) -> Any:
    """The same with an Outside for each tensor from before; those without dimensions are numbers, which are kept."""
    if isinstance(value, Tensor):
        if storage_address(value) in inside or value.dim() == 0:
            return value
        like = (value.dtype, tuple(value.shape), value.stride(), value.storage_offset())
        return Outside(StorageWeakRef(value.untyped_storage()), like, str(op.func))
    if isinstance(value, list | tuple):
        return type(value)(outside(item, inside, op) for item in value)
    if isinstance(value, dict):
        return {name: outside(item, inside, op) for name, item in value.items()}
    return value


def present(value: Any) -> Any:
    if isinstance(value, Outside):
        return value.tensor()
    if isinstance(value, list | tuple):
        return type(value)(present(item) for item in value)
    if isinstance(value, dict):
        return {name: present(item) for name, item in value.items()}
    return value


def finish(returned: Any) -> None:
    """Wait for the works in what a collective returned."""
    for one in returned if isinstance(returned, list | tuple) else [returned]:
        if hasattr(one, "wait"):
            one.wait()


# -- attention that reads tables, in torch -----------------------------------------------------------------------------


class TableBackend:
    """Attention by tables alone, as a GPU does it, in plain torch: fixed shapes, and no number is read by the host."""

    reads_tables = graphs = True

    def __init__(self, storage: Tensor):
        self.storage = storage

    def __call__(self, spans: Sequence[Span], tables: Tables[Tensor] | None) -> TableAttention:
        assert tables is not None
        return TableAttention(self.storage, tables)


class TableAttention:
    def __init__(self, storage: Tensor, tables: Tables[Tensor]):
        self.storage = storage
        self.tables = tables

    def __call__(
        self,
        layer: int,
        qk: Tensor,
        v: Tensor,
        rotary: tuple[Tensor, Tensor],
        options: Options,
        rows: Rows | None = None,
        norms: tuple[Norm, Norm] | None = None,
    ) -> Tensor:
        heads = (qk.shape[1] - v.shape[1], v.shape[1])
        if norms is not None:
            qk = torch.cat([norm(x) for norm, x in zip(norms, qk.split(heads, dim=1), strict=True)], dim=1)
        q, k = rotate(qk, rotary).split(heads, dim=1)
        self.write(layer, k, v)
        out = self.attend(layer, q, options)
        return out if rows is None else out.index_select(0, rows.index)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Padding writes the first token's keys and values once more: it is never padding."""
        block_size, slots = self.storage.shape[3], self.tables.slots
        cache, padding = self.storage.view(-1, *self.storage.shape[4:]), slots < 0
        slots = torch.where(padding, slots[:1], slots) + 2 * layer * block_size
        for at, new in ((slots, k), (slots + block_size, v)):
            cache.index_copy_(0, at, torch.where(padding[:, None, None], new[:1], new))

    def attend(self, layer: int, q: Tensor, options: Options) -> Tensor:
        tables, token = self.tables, torch.arange(len(q))
        span = torch.bucketize(token, tables.query_starts[1:].long(), right=True).clamp_max(len(tables.kv_lengths) - 1)
        last = tables.query_starts[1:].index_select(0, span) - 1
        seen = (tables.kv_lengths.index_select(0, span) - (last - token))[:, None]  # keys that each query sees
        keys, values = (self.pages(layer, which, span) for which in (0, 1))  # [tokens, keys, kv_heads, head_dim]
        key = torch.arange(keys.shape[1])
        visible = (key < seen) & (key >= seen - (options.window or keys.shape[1]))
        keys, values = (torch.where(visible[:, :, None, None], x, 0.0) for x in (keys, values))
        grouped = q.unflatten(1, (keys.shape[2], -1))
        scores = torch.einsum("tkgd,tskd->tkgs", grouped, keys) * options.scale
        if options.softcap is not None:
            scores = torch.tanh(scores / options.softcap) * options.softcap
        weights = torch.where(visible[:, None, None], scores, float("-inf")).softmax(-1)
        out = torch.einsum("tkgs,tskd->tkgd", torch.where(visible[:, None, None], weights, 0.0), values)
        return out.reshape(len(q), -1)

    def pages(self, layer: int, which: int, span: Tensor) -> Tensor:
        blocks = self.tables.block_tables.index_select(0, span).long()
        return (
            self.storage[:, layer, which].index_select(0, blocks.flatten()).view(len(span), -1, *self.storage.shape[4:])
        )


@contextmanager
def captured_runner(runner: Runner) -> Iterator[FakeCapturer]:
    """Inside, the runner's steps are captured, by attention that reads tables, on two streams."""
    backend, capturer = TableBackend(runner.storage), FakeCapturer()
    kept = {name: vars(runner).pop(name, None) for name in ("graphs", "attention", "lane")}
    runner.attention = Backends(backend, backend)
    runner.capturer, runner.lane = capturer, StreamLane(capturer.streams, (capturer.streams,))
    yield capturer
    runner.capturer = None
    for name, value in kept.items():
        vars(runner).pop(name, None)
        if value is not None:
            setattr(runner, name, value)
    assert isinstance(runner.inline, InlineLane)
