"""Inputs of halves: packed into one copy and back, padded to a bucket, late tokens in their places."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.test_batch import BATCHES, BLOCK_SIZE
from tokenweave.engine.batch import Batch, Span
from tokenweave.engine.inputs import Inputs, inputs_of, known_tokens, padded_inputs_of
from tokenweave.engine.packing import ALIGNMENT_BYTES, pack, places_of, unpack, upload
from tokenweave.engine.tables import Capacity, capacity_of, tables_of

CPU = torch.device("cpu")
LAYERS = 3
DECODE = Batch(tuple(Span((7 + i,), 4 + i, (i, 9), 3, wanted=1) for i in range(3)), late=((0, 2), (2, 0)))


def full_inputs(batch: Batch) -> Inputs[np.ndarray]:
    return inputs_of(batch, tables_of(batch, capacity_of(batch, BLOCK_SIZE), LAYERS, BLOCK_SIZE))


def same(one: Inputs, other: Inputs) -> bool:
    pairs = list(zip(one.arrays, other.arrays, strict=True))
    return all(np.array_equal(a, b.numpy()) and torch.from_numpy(a).dtype == b.dtype for a, b in pairs)


@given(batch=BATCHES, data=st.data())
@settings(deadline=None, derandomize=True)
def test_packed_and_back(batch, data):
    cut = data.draw(st.integers(0, batch.rows))
    parts = [batch.narrow(*bound) for bound in ((0, cut), (cut, batch.rows))]
    host = [full_inputs(part) for part in parts if part.rows]
    for one, back, up in zip(host, unpack(pack(host, CPU), host), upload(host, CPU), strict=True):
        assert same(one, back)
        assert same(one, up)
        assert back.tables.capacity == one.tables.capacity


def test_places_depend_on_shapes_alone():
    """So that what a graph has captured lies where it lay, whatever the next batch holds."""
    one, other = full_inputs(DECODE), full_inputs(Batch(tuple(DECODE.spans[i] for i in (2, 0, 1)), late=((1, 1),)))
    assert places_of(one.arrays) == places_of(other.arrays)
    packed = pack([one], CPU)
    (views,) = unpack(packed, [one])
    packed.copy_(pack([other], CPU))
    assert same(other, views)
    assert all(place.start % ALIGNMENT_BYTES == 0 for place in places_of(one.arrays))


def test_each_step_has_memory_of_its_own():
    """The copy of the step before may still be under way."""
    one, other = (pack([full_inputs(DECODE)], CPU) for _ in range(2))
    assert one.data_ptr() != other.data_ptr()


def test_late_tokens_come_from_the_step_before():
    (inputs,) = upload([inputs_of(DECODE, None)], CPU)
    assert inputs.sources.tolist() == [2, -1, 0]
    assert known_tokens(inputs, torch.tensor([50, 51, 52])).tolist() == [52, 8, 50]
    for part, tokens in ((DECODE.narrow(0, 2), [52, 8]), (DECODE.narrow(1, 3), [8, 50]), (DECODE.narrow(1, 2), [8])):
        (half,) = upload([inputs_of(part, None)], CPU)
        assert known_tokens(half, torch.tensor([50, 51, 52])).tolist() == tokens


def test_nothing_late_needs_no_step_before():
    (inputs,) = upload([inputs_of(Batch(DECODE.spans), None)], CPU)
    assert inputs.sources is None
    assert known_tokens(inputs, None).tolist() == [7, 8, 9]


def test_late_tokens_without_a_step_before():
    (inputs,) = upload([inputs_of(DECODE, None)], CPU)
    with pytest.raises(AssertionError, match="comes after a step that drew them"):
        known_tokens(inputs, None)


def test_padding():
    room = Capacity(tokens=5, rows=5, spans=5, blocks=4, longest=1)
    padded = padded_inputs_of(DECODE, tables_of(DECODE, room, LAYERS, BLOCK_SIZE))
    assert padded.token_ids.tolist() == [7, 8, 9, 0, 0]
    assert padded.positions.tolist() == [4, 5, 6, 0, 0]
    assert padded.logits_rows.tolist() == [0, 1, 2, 0, 0]
    assert padded.sources.tolist() == [2, -1, 0, -1, -1]
    assert padded.tables.slots.tolist()[3:] == [-1, -1]
    assert padded.tables.kv_lengths.tolist()[3:] == [0, 0]


@pytest.mark.gpu
def test_copies_to_a_gpu_do_not_overtake_each_other():
    """Steps are packed faster than the GPU takes them: pinned memory is handed out again when its copy is done."""
    device = torch.device("cuda")
    torch.cuda._sleep(200_000_000)  # a tenth of a second or so: all copies queue behind it
    batches = [Batch(tuple(Span((step,), 4 + i, (i, 9), 3, wanted=1) for i in range(64))) for step in range(200)]
    ups = [upload([inputs_of(batch, None)], device)[0] for batch in batches]
    for step, up in enumerate(ups):
        assert up.token_ids.tolist() == [step] * 64
