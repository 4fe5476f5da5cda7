import math
from itertools import product

import pytest
import torch

from tokenweave.engine import random
from tokenweave.engine.random import gumbel, request_key, uniform

KEYS = [2558736989570252433, 9194625065566671773]
BITS = [[119348879360, 300961234944, 698780876800], [695727947776, 272117219328, 1074964791296]]


def numbers(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    keys = torch.tensor([request_key(seed, row, 0) for row in range(rows)])
    return uniform(keys, torch.full((rows,), 7), torch.arange(columns))


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([x.double().flatten(), y.double().flatten()]))[0, 1].item()


def test_mix_is_splitmix64():
    # The first outputs of splitmix64 seeded with 1234567, as published with it.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = [(1234567 + random.GAMMA * i) % 2**64 for i in range(1, 5)]
    assert [random._mix_int(state) for state in states] == published
    mixed = random._mix(torch.tensor([random._signed(state) for state in states]))
    assert [value % 2**64 for value in mixed.tolist()] == published


def test_golden_values():
    """A change here changes what every seed generates."""
    keys = [request_key(0, 0, 0), request_key(-1, 2**40, 3)]
    assert keys == KEYS
    values = uniform(torch.tensor(keys), torch.tensor([0, 131072]), torch.tensor([0, 1, 151935]))
    assert (values.double() * 2**40).long().tolist() == BITS


def test_chunks_and_order_do_not_show():
    keys, positions, columns = torch.arange(6) * 2**60, torch.arange(6) % 3, torch.arange(100)
    whole = uniform(keys, positions, columns)
    row_order, column_order = torch.tensor([3, 1, 5]), torch.tensor([99, 0, 50, 7])
    part = uniform(keys[row_order], positions[row_order], columns[column_order])
    assert torch.equal(part, whole[row_order][:, column_order])


def test_arguments_are_left_as_they_are():
    keys, positions, columns = torch.arange(3), torch.arange(3), torch.arange(5)
    uniform(keys, positions, columns)
    assert keys.tolist() == positions.tolist() == [0, 1, 2]
    assert columns.tolist() == [0, 1, 2, 3, 4]


def test_uniform():
    """A chi-squared test of 256 equal bins, at six sigma of its normal approximation."""
    values = numbers(64, 1 << 14)
    counts = torch.histc(values, 256, 0, 1).double()
    expected = values.numel() / 256
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(statistic - 255) < 6 * math.sqrt(2 * 255)


def test_every_row_is_uniform():
    means = numbers(256, 1 << 12).mean(-1)
    assert ((means - 0.5).abs() < 6 * math.sqrt(1 / 12 / (1 << 12))).all()


def test_neighbouring_counters_are_not_correlated():
    """Over columns, positions, keys that count and keys of neighbouring requests, at lags 1 and 2."""
    side, columns = 128, torch.arange(512)
    counting, fixed = torch.arange(side), torch.full((side,), 5)
    requests = torch.tensor([request_key(3, i, 0) for i in range(side)])
    for keys, positions in ((counting, fixed), (fixed, counting), (requests, fixed), (counting, counting)):
        values = uniform(keys, positions, columns)
        for lag in (1, 2):
            bound = 6 / math.sqrt(values.numel())
            assert abs(correlation(values[lag:], values[:-lag])) < bound
            assert abs(correlation(values[:, lag:], values[:, :-lag])) < bound


def test_every_counter_bit_changes_half_of_the_bits():
    def bits(key: int, position: int, column: int) -> int:
        value = uniform(torch.tensor([key]), torch.tensor([position]), torch.tensor([column]))
        return int(value.item() * 2**20)

    start = (request_key(0, 0, 0), 1000, 2000)
    changed = []
    for which, bit in [(0, b) for b in range(63)] + [(w, b) for w in (1, 2) for b in range(20)]:
        flipped = tuple(value ^ (1 << bit) if i == which else value for i, value in enumerate(start))
        changed.append((bits(*start) ^ bits(*flipped)).bit_count())
    assert min(changed) >= 1
    assert abs(sum(changed) / len(changed) - 10) < 6 * math.sqrt(5 / len(changed))


@pytest.mark.parametrize(("bits", "expected"), [(0, 2.0**-53), (2**53 - 1, 1 - 2.0**-24)])
def test_the_ends_lie_inside_zero_and_one(monkeypatch, bits, expected):
    monkeypatch.setattr(random, "_mix", lambda z: torch.full_like(z, bits))
    value = uniform(torch.tensor([1]), torch.tensor([1]), torch.tensor([1]))
    assert value.dtype == torch.float32
    assert value.item() == expected
    noise = gumbel(torch.tensor([1]), torch.tensor([1]), torch.tensor([1])).item()
    assert noise == pytest.approx(-math.log(-math.log1p(-expected)), rel=1e-6)


def test_gumbel_moments_and_tail():
    keys = torch.tensor([request_key(1, row, 0) for row in range(64)])
    noise = gumbel(keys, torch.zeros(64, dtype=torch.long), torch.arange(1 << 14)).double()
    count = noise.numel()
    assert noise.mean().item() == pytest.approx(0.5772157, abs=6 * math.pi / math.sqrt(6 * count))
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)
    for height in (2.0, 6.0, 9.0):  # P(noise > h) = 1 - exp(-exp(-h))
        expected = -math.expm1(-math.exp(-height)) * count
        assert abs((noise > height).sum().item() - expected) < 6 * math.sqrt(expected)


def test_request_keys_differ():
    keys = {request_key(*parts) for parts in product((-1, 0, 1, 2**63 - 1), range(50), range(50))}
    assert len(keys) == 4 * 50 * 50
    assert all(-(2**63) <= key < 2**63 for key in keys)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_does_not_show():
    keys, positions, columns = torch.arange(8) * 2**60, torch.arange(8), torch.arange(151936)
    on_gpu = uniform(keys.cuda(), positions.cuda(), columns.cuda())
    assert torch.equal(on_gpu.cpu(), uniform(keys, positions, columns))
