"""Counter-based random numbers: a pure function of (key, position, column), so of nothing that a batch decides.

    row    = mix(mix(key) + GAMMA * (position + 1))
    number = mix(row      + GAMMA * (column + 1))

`mix` is the finaliser of splitmix64, so the numbers of one row are the splitmix64 stream seeded with `row`. All of it
is int64 arithmetic that wraps around: exact, and the same on every device.
"""

from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
MASK = 2**64 - 1

LARGEST_BELOW_ONE = 1 - 2**-24  # in fp32


def request_key(seed: int, request_index: int, sample_index: int) -> int:
    """The 64-bit key (as a signed int) of one completion's random numbers.

    A request with a seed of its own passes request_index=0, so that its tokens depend on no other request; one without
    passes the engine's seed and a number that no other request has. sample_index counts the n completions of a request.
    """
    key = 0
    for part in (seed, request_index, sample_index):
        key = _mix_int((key + GAMMA + part) & MASK)
    return _signed(key)


def uniform(keys: Tensor, positions: Tensor, columns: Tensor) -> Tensor:
    """Uniform numbers, fp32 [R, V], inside (0, 1), for int64 keys [R], positions [R] and columns [V].

    Any chunking gives the same numbers. 52 bits are drawn, so close to 0 they are as fine as 2**-52; close to 1 they
    are as fine as fp32 is (2**-24). kernels/sampling.py draws the same.
    """
    rows = _mix(_mix(keys.clone()).add_((positions + 1) * _signed(GAMMA)))
    bits = _mix(rows[:, None] + (columns + 1)[None, :] * _signed(GAMMA))
    odd = bits.bitwise_and_(2**53 - 1).bitwise_or_(1)  # odd / 2**53 lies in the middle of its 2**-52 wide bin: never 0
    return odd.float().mul_(2.0**-53).clamp_(max=LARGEST_BELOW_ONE)


def gumbel(keys: Tensor, positions: Tensor, columns: Tensor) -> Tensor:
    """Standard Gumbel noise, fp32 [R, V]; arguments as for `uniform`.

    -log(-log(1 - u)) and not -log(-log(u)): the large values, which decide an argmax, then come from u close to 0,
    where u is fine.
    """
    return uniform(keys, positions, columns).neg_().log1p_().neg_().log_().neg_()


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser, in place on int64."""
    z ^= _shifted_right(z, 30)
    z *= _signed(MULTIPLIERS[0])
    z ^= _shifted_right(z, 27)
    z *= _signed(MULTIPLIERS[1])
    z ^= _shifted_right(z, 31)
    return z


def _shifted_right(z: Tensor, count: int) -> Tensor:
    """Logical shift: int64's own is arithmetic, so the copies of the sign are masked away."""
    return (z >> count).bitwise_and_(2 ** (64 - count) - 1)


def _mix_int(z: int) -> int:
    z = ((z ^ (z >> 30)) * MULTIPLIERS[0]) & MASK
    z = ((z ^ (z >> 27)) * MULTIPLIERS[1]) & MASK
    return z ^ (z >> 31)


def _signed(z: int) -> int:
    return z - 2**64 if z >= 2**63 else z


CONSTANTS = (_signed(GAMMA), *map(_signed, MULTIPLIERS))  # as int64
