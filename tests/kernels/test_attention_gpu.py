"""The attention kernels on a GPU: in every dtype and head size against the plain maths, and captured."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.kernels.paged import EXACT, PaddedBackend, Padding, tables_on
from tests.texts import OPTIONS, PLAIN, TOLERANCE, Texts, no_rotation
from tokenweave.engine.attention import open_attention
from tokenweave.engine.batch import Batch, Span
from tokenweave.engine.kv_cache import allocate_storage
from tokenweave.models.attention import Options, PagedAttention

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (8, 64, 96, 128, 256)
MIXED = Padding(tokens=5, rows=2, spans=3, blocks=2, mixed=True)


def open_triton(storage: torch.Tensor):
    return open_attention("triton", storage).eager


def steps_cases() -> list[Any]:
    """(head_dim, dtype, options). Each is compiled, for seconds: all of them take minutes. In short every head size,
    every dtype and every kind of options comes once."""
    short = {(dim, torch.bfloat16, "plain") for dim in HEAD_DIMS} | {(128, torch.bfloat16, name) for name in OPTIONS}
    short |= {(128, torch.float16, "plain"), (64, torch.float32, "window and soft cap"), (256, torch.float32, "plain")}
    return [
        pytest.param(*case, id="-".join(map(str, case)), marks=() if case in short else pytest.mark.full)
        for case in itertools.product(HEAD_DIMS, DTYPES, OPTIONS)
    ]


@pytest.mark.parametrize("padding", [EXACT, MIXED], ids=["exact", "padded"])
@pytest.mark.parametrize(("head_dim", "dtype", "name"), steps_cases())
def test_steps(head_dim, dtype, name, padding):
    shape = {"block_size": 16, "heads": 8, "kv_heads": 2, "head_dim": head_dim, "dtype": dtype, "device": "cuda"}
    texts = Texts([90, 9, 150, 40], attend=PaddedBackend(open_triton, padding), **shape)
    options = Options(head_dim**-0.5, OPTIONS[name].window, OPTIONS[name].softcap)
    texts.check([80, 1, 140, 3], options)
    texts.check([1, 3, 5, 33], options, None, [1, 0, 1, 1])
    texts.check([1, 1, 1, 1], options, 2)


def long_spans(queries: int, contexts: list[int], block_size: int) -> list[Span]:
    """Each with blocks of its own, in no order."""
    counts = [-(-(context + queries) // block_size) for context in contexts]
    blocks = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).split(counts)
    pairs = zip(contexts, blocks, strict=True)
    return [Span((0,) * queries, context, tuple(of.tolist()), context + queries, 1) for context, of in pairs]


@pytest.mark.parametrize("options", [PLAIN, Options(0.08, window=1024), Options(0.08, softcap=30.0)], ids=str)
@pytest.mark.parametrize("queries", [1, 300])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (8, 1), (7, 7)])
def test_long_contexts_as_torch(heads, kv_heads, queries, options):
    """Many splits of one sequence; a cache of more than 2**31 elements, of which the last blocks are used too."""
    spans = long_spans(queries, [9000, 3, 4095, 0], 16)
    most = max(block for span in spans for block in span.block_table) + 1
    storage = allocate_storage(most, 2, 16, kv_heads, 128, torch.bfloat16, torch.device("cuda")).normal_()
    tokens = queries * len(spans)
    qk = torch.randn(tokens, heads + kv_heads, 128, device="cuda").bfloat16()
    v = torch.randn(tokens, kv_heads, 128, device="cuda").bfloat16()
    got = PaddedBackend(open_triton)(spans, storage)(1, qk, v, no_rotation(qk), options)
    wanted = PagedAttention(spans, storage.float())(1, qk.float(), v.float(), no_rotation(qk), options)
    torch.testing.assert_close(got.float(), wanted, rtol=0, atol=TOLERANCE[torch.bfloat16])


def test_places_beyond_2_31_elements():
    free, _ = torch.cuda.mem_get_info()
    if free < 12 << 30:
        pytest.skip("needs 12 GB of free memory")
    layers, blocks = 64, 70_000
    storage = torch.empty(blocks, layers, 2, 16, 1, 64, dtype=torch.bfloat16, device="cuda")
    assert storage.numel() > 2**32
    span = Span((0,) * 20, 0, (blocks - 1, blocks - 2), 20, 1)
    qk = torch.randn(20, 3, 64, device="cuda").bfloat16()
    v = torch.randn(20, 1, 64, device="cuda").bfloat16()
    got = PaddedBackend(open_triton)([span], storage)(layers - 1, qk, v, no_rotation(qk), PLAIN)
    wanted = PagedAttention([span], storage)(layers - 1, qk, v, no_rotation(qk), PLAIN)
    torch.testing.assert_close(got.float(), wanted.float(), rtol=0, atol=TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("options", [PLAIN, Options(0.35, window=100)], ids=str)
def test_a_captured_launch_is_right_for_other_tables(options):
    """Captured with one batch, launched with others of the same capacity."""
    room = Padding(tokens=40, rows=4, spans=4, blocks=60, mixed=True)
    storage = allocate_storage(400, 2, 16, 2, 128, torch.bfloat16, torch.device("cuda")).normal_()
    first = long_spans(20, [5, 700, 0], 16)
    _, tables = tables_on(first, storage, room)
    qk = torch.randn(tables.capacity.tokens, 10, 128, device="cuda").bfloat16()
    v = torch.randn(tables.capacity.tokens, 2, 128, device="cuda").bfloat16()
    attention = open_attention("triton", storage).captured(first, tables)
    attention(1, qk, v, no_rotation(qk), options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(1, qk, v, no_rotation(qk), options)
    for contexts, queries in [([5, 700, 0], 20), ([33, 1], 1), ([900, 0, 16, 15], 13)]:
        spans = long_spans(queries, contexts, 16)
        capacity = tables.capacity
        exact = sum(len(span) for span in spans)
        others = tables_on(spans, storage, padding_to(capacity, spans))[1]
        for name in ("slots", "query_starts", "tail_starts", "kv_lengths", "block_tables"):
            getattr(tables, name).copy_(getattr(others, name))
        graph.replay()
        wanted = PagedAttention(spans, storage)(1, qk[:exact], v[:exact], no_rotation(qk[:exact]), options)
        torch.testing.assert_close(out[:exact].float(), wanted.float(), rtol=0, atol=TOLERANCE[torch.bfloat16])
        assert not out[exact:].any()


def padding_to(capacity, spans: list[Span]) -> Padding:
    """What these spans leave of a capacity."""
    from tokenweave.engine.tables import capacity_of

    exact = capacity_of(Batch(tuple(spans)), 16)
    left = [getattr(capacity, name) - getattr(exact, name) for name in ("tokens", "rows", "spans", "blocks")]
    return Padding(*left, mixed=True)
