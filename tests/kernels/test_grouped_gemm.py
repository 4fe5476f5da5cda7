"""Grouping by expert and the experts' GEMMs in Triton's interpreter against a loop over experts, and as compiled."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.fence import fenced
from tests.kernels.triton_aot import CAPABILITIES, compiled, launches
from tests.pairwise import pairwise
from tokenweave.kernels.expert_tiles import TILE_ROWS, most_tiles, tile_rows
from tokenweave.models.experts import Experts
from tokenweave.models.layers import Place
from tokenweave.models.spec import ExpertsSpec


def a_block(experts, top_k, hidden, width, activation="silu", dtype=torch.float32, device="cpu") -> Experts:
    torch.manual_seed(hidden + width)
    spec = ExpertsSpec(experts, top_k, width, True, "", "", "", "", "")
    block = Experts(Place(0, 1, dtype, torch.device(device)), hidden, spec, activation)
    for weight in (block.router, block.gate_up, block.down):
        weight.copy_(torch.randn(weight.shape) / weight.shape[-1] ** 0.5)
    return block


def skewed(tokens: int, experts: int, top_k: int) -> torch.Tensor:
    """int64 [tokens, top_k]: some experts get much, the last but one nothing."""
    random = torch.Generator().manual_seed(tokens + experts)
    liking = torch.linspace(3, 0, experts)
    liking[-2] = -torch.inf
    return (liking + torch.rand(tokens, experts, generator=random) * 3).topk(top_k, dim=-1).indices


def grouped(chosen: torch.Tensor, experts: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    from tokenweave.kernels.expert_routing import group_by_expert

    groups = group_by_expert(fenced(chosen), experts, rows)
    return groups.order, groups.tiles


def check_groups(chosen: torch.Tensor, order: torch.Tensor, tiles: torch.Tensor, experts: int, rows: int) -> None:
    assert order.tolist() == chosen.flatten().argsort(stable=True).tolist()
    assert len(tiles) == most_tiles(chosen.numel(), experts, rows)
    used = [(expert, first, end) for expert, first, end in tiles.tolist() if first < end]
    assert [place for _, first, end in used for place in range(first, end)] == list(range(chosen.numel()))
    assert all(end - first <= rows for _, first, end in used)
    assert all(chosen.flatten()[order[first:end].long()].eq(expert).all() for expert, first, end in used)
    counts = chosen.flatten().bincount(minlength=experts)
    assert len(used) == int(((counts + rows - 1) // rows).sum())
    assert tiles[len(used) :].eq(0).all()


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "rows"), [(1, 4, 2, 16), (40, 4, 2, 16), (700, 5, 3, 32), (9, 130, 8, 16)]
)
def test_groups(interpreted, tokens, experts, top_k, rows):
    chosen = skewed(tokens, experts, top_k)
    check_groups(chosen, *interpreted(grouped, chosen, experts, rows), experts, rows)


def no_groups() -> tuple[int, int]:
    order, tiles = grouped(torch.empty(0, 2, dtype=torch.int64), 4, 16)
    return len(order), len(tiles)


def test_no_tokens(interpreted):
    assert interpreted(no_groups) == (0, 0)


@pytest.mark.parametrize("fault", ["lost", "twice", "other expert", "unstable"])
def test_a_fault_in_groups_would_be_seen(interpreted, fault):
    chosen = skewed(40, 4, 2)
    order, tiles = interpreted(grouped, chosen, 4, 16)
    if fault == "lost":
        tiles[0, 2] -= 1
    elif fault == "twice":
        tiles[1, 1] -= 1
    elif fault == "other expert":
        tiles[0, 0] += 1
    else:
        order[:2] = order[:2].flip(0)
    with pytest.raises(AssertionError):
        check_groups(chosen, order, tiles, 4, 16)


def both(tokens, experts, top_k, hidden, width, activation="silu", skew=False) -> tuple[torch.Tensor, torch.Tensor]:
    """(ours, one expert after the other), for x and out whose rows lie apart."""
    block = a_block(experts, top_k, hidden, width, activation)
    block.gate_up, block.down = fenced(block.gate_up), fenced(block.down)
    x, out = (fenced(torch.randn(tokens, hidden + 3)[:, :hidden]) for _ in range(2))
    weights, chosen = block.route(x)
    chosen = fenced(skewed(tokens, experts, top_k) if skew else chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", fenced_empty)  # what passes between kernels ends at fences, too
        got = block.all_at_once(x, chosen, fenced(weights), out)
    return got, block.one_by_one(x, chosen, weights)


def fenced_empty(
    like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None, device: str = "cpu"
) -> torch.Tensor:
    return fenced(torch.full(shape, float("nan"), device=device).to(dtype or like.dtype))


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 4, 2, 64, 32),
        (7, 4, 2, 40, 24),  # nothing divides into tiles
        (21, 3, 1, 64, 160),  # several column blocks
        (80, 3, 2, 32, 16),  # several tiles an expert
        (5, 6, 4, 1030, 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("skew", [False, True])
def test_as_one_by_one(interpreted, sizes, skew):
    got, wanted = interpreted(both, *sizes, skew=skew)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert float(wanted.abs().max()) > 0.1


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_activations(interpreted, activation):
    torch.testing.assert_close(*interpreted(both, 5, 4, 2, 32, 16, activation), rtol=1e-5, atol=1e-5)


def with_tile(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    import tokenweave.kernels.grouped_gemm as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "tile_rows", lambda assignments, experts: rows)
        return both(70, 3, 2, 48, 40)


@pytest.mark.parametrize("rows", TILE_ROWS)
def test_every_tile_size(interpreted, rows):
    torch.testing.assert_close(*interpreted(with_tile, rows), rtol=1e-5, atol=1e-5)


def test_experts_choose_the_same_weights_for_a_half():
    """What makes halves comparable: routing looks at one token at a time."""
    block = a_block(8, 2, 32, 16)
    x = torch.randn(12, 32)
    weights, chosen = block.route(x)
    assert block.route(x[5:])[1].equal(chosen[5:])
    torch.testing.assert_close(block.route(x[5:])[0], weights[5:])


SHAPES = {"Mixtral-8x7B TP1": (8, 2, 4096, 14336), "Qwen3-30B-A3B TP8": (128, 8, 2048, 96), "odd": (8, 2, 2880, 1440)}
COMPILED = pairwise(
    {
        "capability": CAPABILITIES,
        "dtype": (torch.bfloat16, torch.float16),
        "shape": tuple(SHAPES),
        "rows": TILE_ROWS,
    },
    lambda case: True,
)


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: "-".join(map(str, case.values())))
def test_compiled(case):
    """Without spills, and on tensor cores: those of the arch at hand where a tile has the rows for it."""
    pytest.importorskip("triton")
    for launch in of_experts(*SHAPES[case["shape"]], case["rows"], case["dtype"]):
        built = compiled(launch, case["capability"])
        assert not built.complaints(case["capability"])
        if launch.kernel.fn.__name__ == "grouped_gemm_kernel":
            assert tensor_core_instruction(case["capability"], case["rows"]) in built.asm["ptx"]
            assert "cp.async" in built.asm["ptx"], "loads that nothing overlaps"


def of_experts(experts, top_k, hidden, width, rows, dtype) -> list:
    """The launches for so many tokens that tiles have `rows` rows."""
    return for_tokens(
        next(n for n in range(1, 10000) if tile_rows(n * top_k, experts) == rows), experts, top_k, hidden, width, dtype
    )


def for_tokens(tokens, experts, top_k, hidden, width, dtype) -> list:
    from tokenweave.kernels.grouped_gemm import run_experts

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    chosen, weights = empty(tokens, top_k, dtype=torch.int32), empty(tokens, top_k, dtype=torch.float32)
    gate_up, down = empty(experts, 2 * width, hidden), empty(experts, hidden, width)
    x, out = empty(tokens, hidden), empty(tokens, hidden)
    return launches(lambda: run_experts(x, chosen, weights, gate_up, down, "silu", out))


def tensor_core_instruction(capability: int, rows: int) -> str:
    if rows < 64 or capability == 80:
        return "mma.sync"
    return {90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]


def test_tokens_share_one_kernel():
    """How many tokens there are is no reason to compile anew, but for the size of the tiles."""
    pytest.importorskip("triton")
    seen = [for_tokens(tokens, 8, 2, 64, 32, torch.bfloat16) for tokens in (1, 3, 8)]
    for same in zip(*seen, strict=True):
        special = [parameter.name for parameter in same[0].kernel.params if not parameter.do_not_specialize]
        values = [[launch.arguments.get(name) for name in special] for launch in same]
        numbers = [[value for value in each if not isinstance(value, torch.Tensor)] for each in values]
        assert numbers[0] == numbers[1] == numbers[2]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(8, 2, 512, 256), (128, 8, 256, 96), (5, 2, 200, 72)], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 64, 500, 2048])
def test_on_a_gpu(sizes, tokens, dtype):
    block = a_block(*sizes, dtype=dtype, device="cuda")
    x = torch.randn(tokens, sizes[2], device="cuda", dtype=dtype)
    weights, chosen = block.route(x)
    got = [block.all_at_once(x, chosen, weights, torch.empty_like(x)) for _ in range(2)]
    assert got[0].equal(got[1]), "two runs differ"
    wanted = block.one_by_one(x, chosen, weights)
    step = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-16}[dtype]
    torch.testing.assert_close(got[0].float(), wanted.float(), rtol=4 * step, atol=4 * step)


@pytest.mark.gpu
def test_captured_in_a_graph_on_a_gpu():
    """The host neither waits nor looks, and a replay does what the new routing asks for."""
    block = a_block(8, 2, 256, 128, dtype=torch.bfloat16, device="cuda")
    x, out = torch.randn(33, 256, device="cuda", dtype=torch.bfloat16), torch.empty(33, 256, device="cuda").bfloat16()

    def run() -> None:
        weights, chosen = block.route(x)
        block.all_at_once(x, chosen, weights, out)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        x.normal_()
        graph.replay()
        weights, chosen = block.route(x)
        torch.testing.assert_close(out.float(), block.one_by_one(x, chosen, weights), rtol=3e-2, atol=3e-2)
