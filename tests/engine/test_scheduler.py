"""The scheduler, with a runner that computes nothing but remembers what every place of the cache would hold."""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenweave.engine.kv_cache import BlockPool, block_digests
from tokenweave.engine.policy import Policy, first_come, last_come, whole_budget
from tokenweave.engine.scheduler import Scheduled, Scheduler
from tokenweave.engine.sequence import Sequence

ORDERS = {
    "first come": first_come,
    "last come": last_come,
    "shortest first": lambda waiting: min(waiting, key=lambda one: len(one.tokens)),
    "longest first": lambda waiting: max(waiting, key=lambda one: len(one.tokens)),
}
BUDGETS = {
    "whole": whole_budget,
    "one token": lambda sequence, budget: 1,
    "small chunks": lambda sequence, budget: min(sequence.left, budget, 3),
    "half of it": lambda sequence, budget: max(1, min(sequence.left, budget) // 2),
}
PREEMPTS = {
    "last come": last_come,
    "the first": lambda candidates: candidates[0],
    "the most computed": lambda candidates: max(candidates, key=lambda one: one.computed),
    "the longest": lambda candidates: max(candidates, key=lambda one: len(one.tokens)),
    "anyone": lambda candidates: candidates[zlib.crc32(repr(candidates).encode()) % len(candidates)],
}


@dataclass(eq=False)
class Job(Sequence):
    """A sequence that ends after `new_tokens` tokens, or is given up at step `gives_up`."""

    new_tokens: int = 1
    gives_up: int | None = None
    drawn: list[int] = field(default_factory=list)  # prompt and output as the device knows them

    def __post_init__(self) -> None:
        super().__post_init__()
        self.drawn = list(self.prompt)

    @property
    def done(self) -> bool:
        return len(self.output) == self.new_tokens

    def draw(self, vocabulary: int) -> None:
        """The next token depends on those before it only, as a model's does."""
        self.drawn.append(zlib.crc32(repr(self.drawn).encode()) % vocabulary)


@dataclass
class Simulation:
    """Runs a scheduler's steps, and after each of them checks everything that must always hold."""

    scheduler: Scheduler
    vocabulary: int = 2  # small, so that prefixes are shared
    ahead: bool = False  # schedule a step before the tokens of the one before it are known
    salts: dict[int, int] = field(default_factory=dict)
    # What each place of a block holds: the sequence's salt, and all its tokens up to and with that place's.
    content: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    in_flight: list[list[Job]] = field(default_factory=list)  # who gets a token, of every step that is not taken in
    ended: list[Job] = field(default_factory=list)
    steps: int = 0
    computed_tokens: int = 0

    @property
    def pool(self) -> BlockPool:
        return self.scheduler.pool

    @property
    def busy(self) -> bool:
        return self.scheduler.busy or bool(self.in_flight)

    def step(self) -> list[Scheduled]:
        scheduled = self.scheduler.schedule()
        if self.scheduler.busy:
            self.launch(scheduled)
        while len(self.in_flight) > bool(self.ahead and scheduled):
            for job in self.in_flight.pop(0):
                self.take_in(job)
        self.check_digests()
        return scheduled

    def launch(self, scheduled: list[Scheduled]) -> None:
        self.check_limits(scheduled)
        self.check_owners(scheduled)
        for one in scheduled:
            self.read(one)
        for one in scheduled:
            self.write(one)
        drawing = [one.sequence for one in scheduled if one.sequence.span(one.count).wanted]
        self.scheduler.launched(scheduled)
        for job in drawing:
            job.draw(self.vocabulary)
        self.in_flight.append(drawing)
        self.check_digests()
        self.steps += 1
        self.computed_tokens += sum(one.count for one in scheduled)

    def take_in(self, job: Job) -> None:
        job.late -= 1
        if job not in self.ended:
            job.tokens.append(job.drawn[len(job.tokens)])
            if job.done:
                self.end(job)

    def end(self, job: Job) -> None:
        self.scheduler.finish(job)
        self.ended.append(job)

    def run(self) -> None:
        while self.busy:
            self.step()

    # -- what must hold ------------------------------------------------------------------------------------------------

    def check_limits(self, scheduled: list[Scheduled]) -> None:
        assert scheduled
        assert all(1 <= one.count <= one.sequence.left for one in scheduled)
        assert sum(one.count for one in scheduled) <= self.scheduler.max_num_batched_tokens
        assert len(self.scheduler.running) <= self.scheduler.max_num_seqs
        sequences = [one.sequence for one in scheduled]
        assert len(set(map(id, sequences))) == len(sequences)
        assert all(sequence in self.scheduler.running for sequence in sequences)
        assert all(0 <= sequence.late <= 1 for sequence in sequences)
        assert all(self.ahead or not sequence.late for sequence in sequences)
        assert all(one.count == one.sequence.left == 1 for one in scheduled if one.sequence.late)

    def check_owners(self, scheduled: list[Scheduled]) -> None:
        """Blocks are enough, their users are counted, and what is written belongs to one sequence alone."""
        running = self.scheduler.running
        users = Counter(block for sequence in running for block in sequence.block_table)
        assert all(len(set(sequence.block_table)) == len(sequence.block_table) for sequence in running)
        assert all(not one.block_table and not one.computed for one in self.scheduler.waiting)
        assert self.pool._users == [users[block] for block in range(self.pool.num_blocks)]
        assert set(self.pool._free) == {block for block in range(self.pool.num_blocks) if not users[block]}
        for one in scheduled:
            places = self.places(one.sequence, one.sequence.computed, one.sequence.computed + one.count)
            assert all(users[block] == 1 for block, _ in places)

    def check_digests(self) -> None:
        """A block that may be matched holds what its digest says."""
        size = self.pool.block_size
        assert {block: digest for digest, block in self.pool._block.items()} == self.pool._digest
        for block, digest in self.pool._digest.items():
            salt, tokens = self.content[block, size - 1]
            assert block_digests(tokens, size, salt, [])[-1] == digest
            start = len(tokens) - size
            assert all(self.content[block, i] == (salt, tokens[: start + i + 1]) for i in range(size))

    def places(self, sequence: Sequence, start: int, stop: int) -> list[tuple[int, int]]:
        size = self.pool.block_size
        return [(sequence.block_table[at // size], at % size) for at in range(start, stop)]

    def read(self, one: Scheduled) -> None:
        """All context is in the cache, and is this sequence's."""
        sequence = one.sequence
        for at, place in enumerate(self.places(sequence, 0, sequence.computed)):
            assert self.content[place] == (sequence.salt, tuple(sequence.drawn[: at + 1]))

    def write(self, one: Scheduled) -> None:
        sequence = one.sequence
        stop = sequence.computed + one.count
        for at, place in enumerate(self.places(sequence, sequence.computed, stop), start=sequence.computed):
            self.content[place] = (sequence.salt, tuple(sequence.drawn[: at + 1]))


def simulation(
    blocks: int = 100,
    block_size: int = 4,
    budget: int = 16,
    max_num_seqs: int = 8,
    caching: bool = True,
    policy: Policy | None = None,
    ahead: bool = False,
) -> Simulation:
    return Simulation(Scheduler(BlockPool(blocks, block_size, caching), budget, max_num_seqs, policy), ahead=ahead)


def jobs(simulation: Simulation, *requests: tuple[int, int], distinct: bool = True) -> list[Job]:
    """Add one job per (prompt length, new tokens), in this order."""
    added = []
    for arrival, (prompt_len, new_tokens) in enumerate(requests):
        job = Job(tuple(range(100 * distinct * arrival, 100 * distinct * arrival + prompt_len)), arrival)
        job.new_tokens = new_tokens
        simulation.scheduler.add(job)
        added.append(job)
    return added


def counts(scheduled: list[Scheduled]) -> dict[int, int]:
    """Tokens by arrival."""
    return {one.sequence.arrival: one.count for one in scheduled}


# -- everything at once, at random -------------------------------------------------------------------------------------

LENGTH = 24


@st.composite
def workloads(draw):
    """(simulation, [(step of arrival, job)]): any policies, limits and pools in which each job alone fits."""
    block_size = draw(st.sampled_from([1, 2, 3, 5]))
    requests = draw(
        st.lists(
            st.tuples(
                st.integers(0, 30),  # arrives at this step
                st.lists(st.integers(0, 1), min_size=1, max_size=LENGTH),
                st.integers(1, LENGTH),
                st.integers(0, 1),  # salt
                st.none() | st.integers(0, 40),  # gives up at this step
                st.booleans(),  # arrives as another completion of the request before it
                st.booleans(),  # when it ends is known ahead
            ),
            min_size=1,
            max_size=9,
        )
    )
    arriving = []
    number = 0
    for step, prompt, new_tokens, salt, gives_up, sibling, known in sorted(requests, key=lambda request: request[0]):
        number += not sibling
        job = Job(prompt, number, salt, new_tokens if known else None, new_tokens=new_tokens, gives_up=gives_up)
        arriving.append((step, job))
    # One that ends unforeseen may have been computed a token too far.
    longest = max(len(job.prompt) + job.new_tokens - bool(job.max_tokens) for _, job in arriving)
    blocks = -(-longest // block_size) + draw(st.integers(0, 12))
    policy = Policy(
        ORDERS[draw(st.sampled_from(sorted(ORDERS)))],
        BUDGETS[draw(st.sampled_from(sorted(BUDGETS)))],
        PREEMPTS[draw(st.sampled_from(sorted(PREEMPTS)))],
    )
    limits = {"budget": draw(st.integers(1, 40)), "max_num_seqs": draw(st.integers(1, 6)), "ahead": draw(st.booleans())}
    return simulation(blocks, block_size, caching=draw(st.booleans()), policy=policy, **limits), arriving


@given(workload=workloads())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_every_request_ends_and_every_block_comes_back(workload):
    simulation, arriving = workload
    everyone = [job for _, job in arriving]
    # In every step the longest running one gets on by a token at least, and it stays until it ends.
    bound = sum(len(job.prompt) + job.new_tokens + simulation.ahead for job in everyone)
    now = 0
    while arriving or simulation.busy:
        while arriving and arriving[0][0] <= now:
            simulation.scheduler.add(arriving.pop(0)[1])
        for job in (*simulation.scheduler.running, *simulation.scheduler.waiting):
            if job.gives_up is not None and job.gives_up <= now:
                simulation.end(job)
        if simulation.busy:
            simulation.step()
        assert simulation.steps <= bound
        now += 1
    assert sorted(map(id, simulation.ended)) == sorted(map(id, everyone))
    assert all(job.done for job in everyone if job.gives_up is None)
    assert simulation.pool.num_free == simulation.pool.num_blocks
    assert not any(simulation.pool._users)


@given(workload=workloads())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_is_generated_depends_on_nothing_but_the_prompt(workload):
    simulation, arriving = workload
    for _, job in arriving:
        job.gives_up = None
        simulation.scheduler.add(job)
    simulation.run()
    for _, job in arriving:
        alone = Job(job.prompt, 0, new_tokens=job.new_tokens)
        other = Simulation(Scheduler(BlockPool(2 * LENGTH, 1, False), 100, 1))
        other.scheduler.add(alone)
        other.run()
        assert job.tokens == alone.tokens


# -- continuous batching and chunks ------------------------------------------------------------------------------------


def test_a_new_request_joins_while_others_decode():
    sim = simulation()
    (first,) = jobs(sim, (5, 8))
    assert counts(sim.step()) == {0: 5}
    assert counts(sim.step()) == {0: 1}
    late = Job(tuple(range(50, 57)), 1, new_tokens=2)
    sim.scheduler.add(late)
    assert counts(sim.step()) == {0: 1, 1: 7}
    assert counts(sim.step()) == {0: 1, 1: 1}
    assert late.done
    assert counts(sim.step()) == {0: 1}
    sim.run()
    assert first.done


def test_a_place_that_falls_free_is_taken_in_the_next_step():
    sim = simulation(max_num_seqs=2)
    jobs(sim, (3, 2), (3, 5), (3, 1))
    assert counts(sim.step()) == {0: 3, 1: 3}
    assert counts(sim.step()) == {0: 1, 1: 1}
    assert counts(sim.step()) == {1: 1, 2: 3}
    assert counts(sim.step()) == {1: 1}


def test_a_long_prompt_is_computed_in_chunks_beside_those_that_decode():
    sim = simulation(budget=6)
    jobs(sim, (2, 9), (15, 1), (4, 1))
    assert counts(sim.step()) == {0: 2, 1: 4}
    assert counts(sim.step()) == {0: 1, 1: 5}
    assert counts(sim.step()) == {0: 1, 1: 5}
    assert counts(sim.step()) == {0: 1, 1: 1, 2: 4}
    assert counts(sim.step()) == {0: 1}


def test_only_the_chunk_that_ends_the_prompt_makes_a_token():
    sim = simulation(budget=4)
    (job,) = jobs(sim, (9, 2))
    made = []
    while sim.scheduler.busy:
        sim.step()
        made.append(len(job.output))
    assert made == [0, 0, 1, 2]


@pytest.mark.parametrize("max_num_seqs", [1, 2, 5])
def test_no_more_than_max_num_seqs_run_at_once(max_num_seqs):
    sim = simulation(max_num_seqs=max_num_seqs)
    jobs(sim, *[(2, 3)] * 7)
    most = 0
    while sim.scheduler.busy:
        most = max(most, len(sim.step()))
    assert most == max_num_seqs


def test_a_step_in_flight_keeps_its_block_table():
    sequence = Sequence((1, 2, 3), arrival=0)
    sequence.block_table.extend([7])
    span = sequence.span(3)
    sequence.block_table.extend([8])
    assert list(span.block_table) == [7]


# -- prefix reuse ------------------------------------------------------------------------------------------------------


def test_a_shared_beginning_is_computed_once():
    sim = simulation()
    jobs(sim, (11, 1))
    assert counts(sim.step()) == {0: 11}
    second = Job((*range(8), 50, 51), 1, new_tokens=1)
    sim.scheduler.add(second)
    assert counts(sim.step()) == {1: 2}  # two blocks of 4 are there; the third was not full


def test_those_that_run_together_share_blocks():
    sim = simulation(blocks=100)
    jobs(sim, (12, 5))
    sim.step()
    used = sim.pool.num_blocks - sim.pool.num_free
    twin = Job(tuple(range(12)), 1, new_tokens=5)
    sim.scheduler.add(twin)
    scheduled = sim.step()
    assert counts(scheduled) == {0: 1, 1: 4}
    first, second = (one.sequence.block_table for one in scheduled)
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    assert (
        sim.pool.num_blocks - sim.pool.num_free == used + 2
    )  # one each: the third of the twin, the fourth of the first


@pytest.mark.parametrize("prompt_len", [4, 8])
def test_a_prompt_that_is_cached_whole_still_computes_its_last_token(prompt_len):
    """And with it its block, since blocks are shared whole."""
    sim = simulation()
    jobs(sim, (prompt_len, 1))
    sim.run()
    again = Job(tuple(range(prompt_len)), 1, new_tokens=3)
    sim.scheduler.add(again)
    assert counts(sim.step()) == {1: 4}
    assert len(again.output) == 1


def test_output_is_shared_too():
    sim = simulation()
    (first,) = jobs(sim, (3, 9))
    sim.run()
    follow_up = Job((*first.tokens, 7, 8), 1, new_tokens=1)  # a second turn of a conversation
    sim.scheduler.add(follow_up)
    # 12 tokens; the last was never computed, so two blocks are full.
    assert counts(sim.step()) == {1: 14 - 8}


def test_without_caching_nothing_is_shared():
    sim = simulation(caching=False)
    jobs(sim, (12, 1))
    sim.run()
    sim.scheduler.add(Job(tuple(range(12)), 1, new_tokens=1))
    assert counts(sim.step()) == {1: 12}


def test_another_salt_shares_nothing():
    sim = simulation()
    jobs(sim, (12, 1))
    sim.run()
    sim.scheduler.add(Job(tuple(range(12)), 1, salt=12, new_tokens=1))
    assert counts(sim.step()) == {1: 12}


def test_a_cached_beginning_that_is_in_use_costs_nothing():
    """A pool with room for one prompt, and for what the second adds to it."""
    sim = simulation(blocks=5, block_size=4)
    jobs(sim, (16, 3))
    sim.step()
    sim.scheduler.add(Job(tuple(range(16)), 1, new_tokens=1))
    sim.scheduler.add(Job((*range(12), 99), 2, new_tokens=1))
    assert counts(sim.step()) == {0: 1}  # it takes the last block
    assert sim.pool.num_free == 0
    sim.run()


# -- preemption --------------------------------------------------------------------------------------------------------


def test_the_latest_gives_its_blocks_back_and_comes_again():
    sim = simulation(blocks=5, block_size=1, caching=False)
    first, second = jobs(sim, (2, 4), (2, 3))
    assert counts(sim.step()) == {0: 2, 1: 2}
    assert counts(sim.step()) == {0: 1}  # five blocks are used; the second asked for a sixth
    assert second.preemptions == 1
    assert second.output
    sim.run()
    assert first.preemptions == 0
    assert first.done
    assert second.done


def test_who_was_preempted_does_not_come_back_in_the_same_step():
    sim = simulation(blocks=6, block_size=2, caching=False, budget=4)
    _, second = jobs(sim, (4, 6), (6, 2))
    while not second.preemptions:
        scheduled = sim.step()
    assert 1 not in counts(scheduled)


def test_what_was_preempted_is_found_in_the_cache_again():
    sim = simulation(blocks=8, block_size=1)
    first, second = jobs(sim, (2, 6), (4, 3))
    while not second.preemptions:
        sim.step()
    left = second.left
    while second in sim.scheduler.waiting:
        scheduled = sim.step()
    assert 0 < counts(scheduled)[1] < left
    sim.run()
    assert first.done
    assert second.done


def test_of_one_requests_completions_the_last_gives_way():
    """All have arrived at once, so that arrival alone does not say which."""
    sim = simulation(blocks=12, block_size=1, caching=False)
    first, second, third = (Job((1, 2, 3), 0, new_tokens=4) for _ in range(3))
    for job in (first, second, third):
        sim.scheduler.add(job)
    while not third.preemptions:
        sim.step()
    assert (first.preemptions, second.preemptions) == (0, 0)
    sim.run()
    assert sim.ended == [first, second, third]


def test_a_prompt_starts_when_all_of_it_has_room():
    """Not when a first chunk has: it would be thrown out before its prompt is through, and all that was for nothing."""
    sim = simulation(blocks=10, block_size=1, budget=3, caching=False)
    first, second = jobs(sim, (4, 5), (8, 1))
    sim.run()
    assert sim.ended == [first, second]
    assert second.preemptions == 0
    assert sim.computed_tokens == (4 + 5 - 1) + 8


# -- policies ----------------------------------------------------------------------------------------------------------


def test_order_can_be_swapped():
    sim = simulation(max_num_seqs=1, policy=Policy(order=ORDERS["shortest first"]))
    jobs(sim, (9, 1), (2, 1), (5, 1))
    sim.run()
    assert [job.arrival for job in sim.ended] == [1, 2, 0]


def test_budget_can_be_swapped():
    sim = simulation(policy=Policy(budget=BUDGETS["small chunks"]))
    jobs(sim, (7, 1), (2, 1))
    assert counts(sim.step()) == {0: 3, 1: 2}
    assert counts(sim.step()) == {0: 3}
    assert counts(sim.step()) == {0: 1}


def test_preempt_can_be_swapped():
    """The longest would be the first; but who has run longest stays, so it is the longest of the others."""
    sim = simulation(blocks=13, block_size=1, caching=False, policy=Policy(preempt=PREEMPTS["the longest"]))
    first, second, third = jobs(sim, (5, 4), (4, 2), (3, 2))
    sim.step()
    sim.step()
    assert (first.preemptions, second.preemptions, third.preemptions) == (0, 1, 0)
    sim.run()


@pytest.mark.parametrize("preempt", PREEMPTS)
def test_two_that_fit_only_one_at_a_time_both_end(preempt):
    """Choosing always the one with the most work done would throw each back in turn, for ever."""
    policy = Policy(budget=BUDGETS["small chunks"], preempt=PREEMPTS[preempt])
    sim = simulation(blocks=26, block_size=1, budget=6, caching=False, policy=policy)
    first, second = jobs(sim, (13, 13), (13, 13))
    while sim.scheduler.busy:
        sim.step()
        assert sim.steps <= 2 * 26
    assert sim.ended == [first, second]


@pytest.mark.parametrize("count", [0, -1, 6, 1.5, None, "1"])
def test_a_budget_that_cannot_be_is_an_error_and_no_hang(count):
    sim = simulation(budget=5, policy=Policy(budget=lambda sequence, budget: count))
    jobs(sim, (9, 1))
    with pytest.raises(ValueError, match=r"^the budget policy returned .*; expected a whole number from 1 to 5$"):
        sim.scheduler.schedule()


def test_a_budget_above_what_a_sequence_has_left_is_an_error():
    sim = simulation(budget=5, policy=Policy(budget=lambda sequence, budget: 4))
    jobs(sim, (3, 1))
    with pytest.raises(ValueError, match=r"from 1 to 3$"):
        sim.scheduler.schedule()


@pytest.mark.parametrize("chosen", [None, Job((1, 2), 0)], ids=["none", "a stranger"])
def test_a_choice_of_nobody_is_an_error(chosen):
    sim = simulation(policy=Policy(order=lambda waiting: chosen))
    jobs(sim, (3, 1))
    with pytest.raises(
        ValueError, match=r"^the order policy returned none of the 1 sequences that it may choose from$"
    ):
        sim.scheduler.schedule()


def test_preempting_one_that_is_in_the_step_already_is_an_error():
    sim = simulation(blocks=5, block_size=1, caching=False)
    first, _ = jobs(sim, (2, 4), (2, 3))
    sim.scheduler.policy = Policy(preempt=lambda candidates: first)
    sim.step()
    with pytest.raises(ValueError, match=r"^the preempt policy returned none of the 1 sequences"):
        sim.step()


def test_a_sequence_that_cannot_fit_is_an_error_and_no_hang():
    """The engine refuses it before; here it is a bug of the caller."""
    sim = simulation(blocks=3, block_size=1)
    jobs(sim, (3, 2))
    sim.step()
    with pytest.raises(RuntimeError, match="one sequence alone does not fit into the cache"):
        sim.step()


def test_finish_takes_a_sequence_out_wherever_it_is():
    sim = simulation(max_num_seqs=1)
    running, waiting = jobs(sim, (3, 5), (3, 5))
    sim.step()
    sim.end(waiting)
    sim.end(running)
    assert not sim.scheduler.busy
    assert sim.pool.num_free == sim.pool.num_blocks


def test_completions_of_one_prompt_compute_it_once():
    pool = BlockPool(64, 4, caching=True)
    scheduler = Scheduler(pool, max_num_batched_tokens=100, max_num_seqs=8)
    prompt = tuple(range(18))  # four full blocks and two tokens
    for _ in range(3):
        scheduler.add(Sequence(prompt, arrival=0))
    scheduler.add(Sequence((50, 51, 52, 53, 54), arrival=1))
    first = scheduler.schedule()
    assert [one.count for one in first] == [18]
    scheduler.launched(first)
    first[0].sequence.tokens.append(1)
    first[0].sequence.late -= 1
    second = scheduler.schedule()
    assert [one.count for one in second] == [1, 2, 2, 5]
