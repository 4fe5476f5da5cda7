"""The two lanes, laid out as weave() fills them: strands first in, first out, and the comm lane in order."""

from __future__ import annotations

from collections.abc import Sequence

# One strand's next segment and the sum after it, seconds: (the segment alone, while the other's sum runs, the sum).
Turn = tuple[float, float, float]
Turns = Sequence[tuple[Turn, Turn]]  # first half, second half; one pair for each request of the strand
TOLERANCE = 1e-9  # of a block's time: two rounds that differ by less are the same


class TwoLanes:
    """When the compute lane, the comm lane and each half's last sum are done.

    At a segment's start its own strand's sum is done, so the only sum that can be in flight is the other strand's, and
    that one has started: the comm lane serves in order. One comparison therefore lays out a segment exactly.
    (Written for speed: a plan looks at dozens of layouts within a millisecond.)
    """

    def __init__(self) -> None:
        self.compute_s = 0.0
        self.comm_s = 0.0
        self.summed_s = [0.0, 0.0]
        self.hidden_s = 0.0  # of sums, while the compute lane computed

    def run_block(self, turns: Turns, repeats: int) -> None:
        """The same turns `repeats` times. Once a round is like the one before, the rest are not laid out one by one."""
        before: tuple[float, ...] = ()
        for done in range(1, repeats + 1):
            start_s, hidden_s = self.compute_s, self.hidden_s
            self.run(turns)
            round_s = self.compute_s - start_s
            state = (round_s, self.summed_s[0] - self.compute_s, self.summed_s[1] - self.compute_s)
            if before and all(abs(a - b) <= TOLERANCE * round_s for a, b in zip(state, before)):
                self._skip((repeats - done) * round_s, (repeats - done) * (self.hidden_s - hidden_s))
                return
            before = state

    def run(self, turns: Turns) -> None:
        """Each pair of turns: the first half's segment and sum, then the second's."""
        compute_s, comm_s, hidden_s, summed_s = self.compute_s, self.comm_s, self.hidden_s, self.summed_s
        for pair in turns:
            for half, (alone_s, beside_s, sum_s) in enumerate(pair):
                own_s = summed_s[half]
                start_s = compute_s if compute_s > own_s else own_s
                together_s = summed_s[1 - half] - start_s
                if together_s <= 0.0:
                    compute_s = start_s + alone_s
                elif beside_s <= together_s:
                    compute_s = start_s + beside_s
                    hidden_s += beside_s
                else:
                    compute_s = start_s + together_s + (1.0 - together_s / beside_s) * alone_s
                    hidden_s += together_s
                comm_s = summed_s[half] = (compute_s if compute_s > comm_s else comm_s) + sum_s
        self.compute_s, self.comm_s, self.hidden_s = compute_s, comm_s, hidden_s

    def _skip(self, seconds: float, hidden_s: float) -> None:
        self.compute_s += seconds
        self.comm_s += seconds
        self.summed_s = [summed_s + seconds for summed_s in self.summed_s]
        self.hidden_s += hidden_s

    @property
    def end_s(self) -> float:
        return max(self.compute_s, *self.summed_s)
