"""The attention kernels in Triton's interpreter against the plain maths, through the cache that they write and read."""

from __future__ import annotations

import pytest
import torch

from tests.checkpoints import prompt_batch
from tests.kernels.paged import EXACT, PaddedBackend, Padding, rotate_and_write
from tests.runtime import watched_generate
from tests.texts import OPTIONS, PLAIN, Texts
from tokenweave import SamplingParams
from tokenweave.models.attention import Options

each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
MIXED = Padding(tokens=5, rows=2, spans=3, blocks=2, mixed=True)
DECODING = Padding(tokens=3, rows=3, spans=3, blocks=1)


def open_triton(storage: torch.Tensor, sms: int = 24):
    from tokenweave.engine.triton_attention import TritonBackend
    from tokenweave.kernels.attention_sizes import Gpu

    return TritonBackend(storage, Gpu(sms, 90))


def steps(texts: Texts, *checks: tuple, padding: Padding = EXACT) -> None:
    """checks: arguments of Texts.check, one after the other."""
    texts.attend = PaddedBackend(open_triton, padding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenweave.engine.triton_attention.rotate_and_write", rotate_and_write)
        for counts, *others in checks:
            texts.check(counts, *others)


@each_option
@pytest.mark.parametrize(("padding", "block_size"), [(EXACT, 16), (MIXED, 4)])
def test_prompts_then_mixed_steps_then_decoding(interpreted, options, padding, block_size):
    checks = [
        ([9, 1, 70, 2], options),
        ([1, 4, 5, 0], options, None, [1, 0, 1, 0]),
        ([1, 2, 3, 1], options, 2),
    ]
    interpreted(steps, Texts([12, 8, 90, 6], block_size), *checks, padding=padding)


def test_with_the_kernel_that_writes(interpreted):
    interpreted(through_all_kernels)


def through_all_kernels() -> None:
    texts = Texts([12, 3, 8], block_size=1, attend=PaddedBackend(open_triton, MIXED))
    for counts, *others in [([9, 0, 5], PLAIN), ([1, 1, 2], OPTIONS["window"], 2, [1, 0, 1])]:
        texts.check(counts, *others)


@pytest.mark.parametrize("name", ["plain", "window of one", "window and soft cap"])
@pytest.mark.parametrize("padding", [EXACT, DECODING, MIXED], ids=["exact", "padded", "among prefills"])
def test_decoding(interpreted, name, padding):
    options = OPTIONS[name]
    checks = [([1, 1, 1, 1], options, None, [1, 1, 1, 1]), ([1, 1, 1, 1], options, None, [0, 1, 0, 1])]
    interpreted(decode_after, [0, 3, 63, 130], checks, padding)


def decode_after(contexts: list[int], checks: list[tuple], padding: Padding = EXACT, **shape) -> None:
    """Fill the cache with `contexts`, then the checks."""
    lengths = [context + sum(check[0][i] for check in checks) for i, context in enumerate(contexts)]
    texts = Texts(lengths, **shape)
    fill(texts, contexts)
    steps(texts, *checks, padding=padding)


def fill(texts: Texts, contexts: list[int]) -> None:
    """Put the first keys and values of each sequence where they belong."""
    for i, context in enumerate(contexts):
        at = torch.arange(context)
        block = torch.tensor(texts.tables[i], dtype=torch.long)[at // texts.block_size]
        for layer in range(texts.storage.shape[1]):
            texts.storage[block, layer, 0, at % texts.block_size] = texts.k[i][layer, :context]
            texts.storage[block, layer, 1, at % texts.block_size] = texts.v[i][layer, :context]
    texts.done = list(contexts)


@pytest.mark.parametrize("options", [PLAIN, Options(0.35, window=300), Options(0.35, 700, 1.5)], ids=str)
@pytest.mark.parametrize("padding", [EXACT, DECODING], ids=["exact", "padded"])
def test_keys_of_a_sequence_in_several_splits(interpreted, options, padding):
    """Some sequences have keys for all splits, some for one."""
    contexts = [1500, 2, 255, 256, 257, 1023]
    interpreted(decode_after, contexts, [([1] * 6, options)], padding, block_size=16, heads=2, kv_heads=1)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(1, 1, 16), (3, 3, 24), (6, 2, 12), (5, 1, 16), (8, 1, 24), (14, 2, 8), (32, 2, 8)],
)
def test_heads_that_share_keys(interpreted, heads, kv_heads, head_dim):
    checks = [([40, 3], Options(0.3, 20, 3.0)), ([1, 2], PLAIN), ([1, 1], PLAIN)]
    interpreted(steps, Texts([42, 6], heads=heads, kv_heads=kv_heads, head_dim=head_dim), *checks)


@pytest.mark.parametrize("window", [None, 1, 64, 100])
@pytest.mark.parametrize("context", [0, 63, 64, 200])
def test_edges_of_tiles(interpreted, window, context):
    """First and last queries of tiles, contexts and windows at the edges of the kernels' blocks of keys."""
    checks = [([count], Options(0.35, window)) for count in (65, 2)]
    interpreted(decode_after, [context], checks, block_size=16, heads=2, kv_heads=1)


@pytest.mark.parametrize("seed", range(8))
def test_any_steps(interpreted, seed):
    interpreted(any_steps, seed)


def any_steps(seed: int) -> None:
    """Lengths, chunks, cuts, blocks, heads, options and padding at random."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    kv_heads = draw(1, 2)
    lengths = [draw(1, 150) for _ in range(draw(1, 4))]
    padding = Padding(draw(0, 9), rows := draw(0, 3), draw(max(1, rows), 4), draw(0, 3), mixed=True)
    options = Options(draw(1, 10) / 10, [None, draw(1, 120)][draw(0, 1)], [None, 2.0][draw(0, 1)])
    texts = Texts(lengths, draw(1, 20), kv_heads * draw(1, 6), kv_heads, seed=seed)
    for _ in range(2):
        counts = [draw(0, length - done) for length, done in zip(lengths, texts.done, strict=True)]
        if sum(counts) > 1:
            wanted = [min(count, draw(0, 1)) for count in counts]
            cut = draw(1, sum(counts) - 1) if draw(0, 1) else None
            steps(texts, (counts, options, cut, wanted), padding=padding)


@pytest.mark.parametrize("name", ["gemma2", "qwen3"])
def test_whole_models_as_with_torch(interpreted, checkpoint, name):
    """Windows and soft caps, norms of heads; chunked prompts, mixed and woven steps, rows that make logits alone."""
    prompts, params = prompt_batch(seed=5, lengths=(9, 3)), SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    options = {"overlap": "weave", "max_num_batched_tokens": 8, "num_kv_blocks": 16, "block_size": 4, "device": "cpu"}
    torch_tells = watched_generate(checkpoint(name), prompts, params, {**options, "attention": "torch"})
    got = interpreted(watched_generate, checkpoint(name), prompts, params, {**options, "attention": "triton"})
    assert got.tokens == torch_tells.tokens
    for ours, theirs in zip(got.logits, torch_tells.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
