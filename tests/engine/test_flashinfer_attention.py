"""What FlashInfer is told, with a stand-in that does its maths in torch from the page tables that it is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.paged import PaddedBackend, rotate_and_write
from tests.texts import OPTIONS, PLAIN, Texts
from tokenweave.models.attention import Options

pytest.importorskip("triton")  # the module's own kernel, which writes keys and values, is Triton's

FILE = "tokenweave.engine.flashinfer_attention"
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


class Wrapper:
    """flashinfer.BatchPrefillWithPagedKVCacheWrapper, as of 0.5 to 0.6."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD"):
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "NHD"
        self.plans = 0

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
    ) -> None:
        arrays = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(array.dtype == torch.int32 and array.ndim == 1 for array in arrays)
        assert len(qo_indptr) == len(paged_kv_indptr) == len(paged_kv_last_page_len) + 1
        assert len(paged_kv_indices) == paged_kv_indptr[-1]
        assert causal
        assert q_data_type == kv_data_type
        self.arrays = [array.tolist() for array in arrays]
        self.shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self.scale, self.window_left, self.cap = sm_scale, window_left, logits_soft_cap
        self.plans += 1

    def run(self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        k, v = paged_kv_cache
        heads, kv_heads, dim, page_size = self.shape
        assert k.shape == v.shape == (len(k), page_size, kv_heads, dim)
        starts, page_starts, pages, last = self.arrays
        assert q.shape == (starts[-1], heads, dim)
        out = torch.empty_like(q)
        for i, last_len in enumerate(last):
            assert 1 <= last_len <= page_size
            mine = pages[page_starts[i] : page_starts[i + 1]]
            count = (len(mine) - 1) * page_size + last_len
            keys, values = (x[mine].flatten(0, 1)[:count].repeat_interleave(heads // kv_heads, 1) for x in (k, v))
            rows = slice(starts[i], starts[i + 1])
            out[rows] = self.attend(q[rows], keys, values)
        return out

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("qhd,khd->hqk", q, keys) * self.scale
        if self.cap:
            scores = self.cap * torch.tanh(scores / self.cap)
        position = torch.arange(len(keys) - len(q), len(keys))[:, None]
        key = torch.arange(len(keys))
        visible = key <= position
        if self.window_left >= 0:
            visible &= key >= position - self.window_left
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, float("-inf")).softmax(-1), values)


class Module:
    """flashinfer, and the wrappers that were asked of it."""

    def __init__(self) -> None:
        self.wrappers: list[Wrapper] = []

    def BatchPrefillWithPagedKVCacheWrapper(self, *args: Any) -> Wrapper:
        self.wrappers.append(Wrapper(*args))
        return self.wrappers[-1]


@pytest.fixture
def module(monkeypatch) -> Module:
    monkeypatch.setattr(f"{FILE}.rotate_and_write", rotate_and_write)
    monkeypatch.setattr(f"{FILE}.WORKSPACE_BYTES", 64)
    return Module()


def texts_through(module: Module, lengths: list[int], **shape) -> Texts:
    from tokenweave.engine.flashinfer_attention import FlashInferBackend

    texts = Texts(lengths, **shape)
    backend = FlashInferBackend(texts.storage, module)
    texts.attend = PaddedBackend(lambda storage: backend)
    return texts


@each_option
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_prompts_then_mixed_steps_then_decoding(module, options, block_size):
    texts = texts_through(module, [20, 9, 30, 16], block_size=block_size, heads=6)
    texts.check([16, 1, 17, 4], options)
    texts.check([1, 4, 5, 0], options, None, [1, 0, 1, 0])
    texts.check([1, 2, 3, 11], options, cut=2, wanted=[1, 1, 0, 1])
    texts.check([1, 1, 1, 1], options, cut=2, wanted=[1, 1, 1, 1])


def test_no_row_makes_logits(module):
    texts = texts_through(module, [9, 5])
    texts.check([8, 4], PLAIN, None, [0, 0])


def test_a_plan_for_each_window_and_for_the_rows_that_make_logits(module):
    texts = texts_through(module, [9, 5])
    texts.check([8, 4], Options(0.35, window=5), None, [1, 1])
    assert [wrapper.window_left for wrapper in module.wrappers] == [4, 4]
    assert [wrapper.arrays[0] for wrapper in module.wrappers] == [[0, 8, 12], [0, 1, 2]]


def test_wrappers_are_used_again_when_their_halves_are_done(module):
    texts = texts_through(module, [60, 60])
    for _ in range(20):
        texts.check([2, 1], PLAIN, cut=1, wanted=[1, 0])
    assert sum(wrapper.plans for wrapper in module.wrappers) == 20 * 3
    assert len(module.wrappers) <= 9
