"""Faults that the fused kernel could have, as replacements in its text: each is a mistake that somebody could make.

On x86, and with luck, most of them give the right numbers.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.kernels.twin import ADDRESS, THREAD
from tokenweave.kernels.fused import headers

PLAIN: tuple[str, ...] = ()
KERNEL, BARRIER, TWIN = "kernel.cuh", "barrier.cuh", "host_twin.h"


@dataclass(frozen=True)
class Fault:
    """`old`, which occurs once in `file`, is `new`; seen in the scenario of that name, compiled with `flags`."""

    name: str
    file: str
    old: str
    new: str
    scenario: str
    flags: tuple[str, ...]

    def plant(self, folder: Path) -> Path:
        """A copy of the kernel's headers in `folder`, with the fault."""
        shutil.copytree(headers(), folder)
        text = (folder / self.file).read_text()
        assert text.count(self.old) == 1, f"{self.file} has {text.count(self.old)} times: {self.old}"
        (folder / self.file).write_text(text.replace(self.old, self.new))
        return folder


# Seen as a wrong result, a sanitizer's report, a rank that gives up, or a hang.
FAULTS = (
    # -- orders of memory
    Fault(
        "a signal is loaded relaxed",
        TWIN,
        "return __atomic_load_n(address, __ATOMIC_ACQUIRE);",
        "return __atomic_load_n(address, __ATOMIC_RELAXED);",
        "two_shot",
        THREAD,
    ),
    Fault(
        "a signal is stored relaxed",
        TWIN,
        "__atomic_store_n(address, value, __ATOMIC_RELEASE);",
        "__atomic_store_n(address, value, __ATOMIC_RELAXED);",
        "multimem",
        THREAD,
    ),
    # -- the barrier
    Fault("no entry barrier", KERNEL, "  if (!meeting.enter()) return;\n", "", "two_shot", THREAD),
    Fault("no exit barrier", KERNEL, "  meeting.leave();\n", "", "one_shot", THREAD),
    Fault(
        "exit without waiting",
        BARRIER,
        "ptx::all_of_block(ptx::thread() >= WORLD || meet(epoch + 2, false));",
        "ptx::all_of_block(true);",
        "multimem",
        THREAD,
    ),
    Fault(
        "exit signal before the rows",
        KERNEL,
        "  group.run();\n",
        "  meeting.leave();\n  group.run();\n  return;\n",
        "two_shot",
        THREAD,
    ),
    Fault(
        "exit signal before all threads of the block are done",
        BARRIER,
        "    ptx::sync_block();\n",
        "",
        "listed",
        THREAD,
    ),
    Fault(
        "threads go on before those that wait",
        BARRIER,
        "return ptx::all_of_block(ptx::thread() >= WORLD || (!aborted() && meet(epoch + 1, true)));",
        "return ptx::thread() >= WORLD || (!aborted() && meet(epoch + 1, true));",
        "two_shot",
        THREAD,
    ),
    Fault(
        "all blocks use the pad of block 0",
        BARRIER,
        "signal[ptx::block()][rank], static_cast<u64>(expected) << 32 | tag);\n"
        "    const u64* slot = &place.pad[rank]->signal[ptx::block()][peer];\n",
        "signal[0][rank], static_cast<u64>(expected) << 32 | tag);\n"
        "    const u64* slot = &place.pad[rank]->signal[0][peer];\n",
        "two_shot",
        THREAD,
    ),
    Fault(
        "waits for its own signal, not the peers'",
        BARRIER,
        "&place.pad[rank]->signal[ptx::block()][peer]",
        "&place.pad[rank]->signal[ptx::block()][rank]",
        "one_shot",
        THREAD,
    ),
    Fault(
        "signals into the slot of another rank",
        BARRIER,
        "&place.pad[peer]->signal[ptx::block()][rank]",
        "&place.pad[peer]->signal[ptx::block()][peer]",
        "impatient",
        PLAIN,
    ),
    Fault(
        "the epoch stands still",
        BARRIER,
        "    if (met && ptx::thread() == 0) place.pad[rank]->epoch[ptx::block()] = epoch + 2;\n",
        "",
        "two_shot",
        THREAD,
    ),
    Fault(
        "the epoch advances by one",
        BARRIER,
        "place.pad[rank]->epoch[ptx::block()] = epoch + 2;",
        "place.pad[rank]->epoch[ptx::block()] = epoch + 1;",
        "two_shot",
        THREAD,
    ),
    Fault("the last epoch is enough", BARRIER, "- expected) >= 0;", "- expected) >= -1;", "multimem", THREAD),
    Fault(
        "a later epoch is not enough for a rank that is slow to look",
        BARRIER,
        "      bool arrived = static_cast<int>(static_cast<u32>(seen >> 32) - expected) >= 0;\n",
        "      for (int i = 0; rank == 1 && i < 2000; ++i) ptx::pause();\n"
        "      seen = ptx::load_acquire(slot);\n"
        "      bool arrived = static_cast<u32>(seen >> 32) == expected;\n",
        "impatient",
        PLAIN,
    ),
    Fault("another tag is an arrival", BARRIER, "arrived && compare &&", "false && compare &&", "odd rows", PLAIN),
    # -- rows
    Fault(
        "one row too many",
        KERNEL,
        "launch.first_row[S::SUM == Sum::ONE_SHOT ? S::WORLD : rank + 1];",
        "launch.first_row[S::SUM == Sum::ONE_SHOT ? S::WORLD : rank + 1] + 1;",
        "two_shot",
        ADDRESS,
    ),
    Fault(
        "one row too few",
        KERNEL,
        "launch.first_row[S::SUM == Sum::ONE_SHOT ? S::WORLD : rank + 1];",
        "launch.first_row[S::SUM == Sum::ONE_SHOT ? S::WORLD : rank + 1] - 1;",
        "multimem",
        PLAIN,
    ),
    Fault(
        "the shard starts one row late",
        KERNEL,
        "? 0 : launch.first_row[rank];",
        "? 0 : launch.first_row[rank] + 1;",
        "two_shot",
        PLAIN,
    ),
    Fault(
        "the stride forgets the groups",
        KERNEL,
        "stride = S::ROWS_PER_BLOCK * ptx::blocks();",
        "stride = ptx::blocks();",
        "one_shot",
        THREAD,
    ),
    Fault(
        "groups of two blocks take the same rows",
        KERNEL,
        "row = first + group * ptx::blocks() + ptx::block();",
        "row = first + group + ptx::block();",
        "multimem",
        PLAIN,
    ),
    Fault(
        "the next row is fetched even if there is none",
        KERNEL,
        "issue(next, ahead - S::VECTORS, next < end)",
        "issue(next, ahead - S::VECTORS, true)",
        "post_norm",
        ADDRESS,
    ),
    Fault(
        "the residual row is not counted from the shard's first",
        KERNEL,
        "static_cast<u64>(of_row - first)",
        "static_cast<u64>(of_row)",
        "two_shot",
        ADDRESS,
    ),
    Fault(
        "a listed row is not counted from the shard's first",
        KERNEL,
        "launch.residual_rows[of_row] - launch.first_residual[rank]",
        "launch.residual_rows[of_row]",
        "listed",
        ADDRESS,
    ),
    # -- the pipeline
    Fault(
        "peers' rows are fetched before the ranks have met",
        KERNEL,
        "  DEVICE void prefetch() {\n    if (row >= end) return;\n",
        "  DEVICE void prefetch() {\n    if (row >= end) return;\n    issue(row, 0, true);\n",
        "two_shot",
        THREAD,
    ),
    Fault(
        "one copy too few is waited for",
        KERNEL,
        "wait_copies<S::AHEAD - 1>",
        "wait_copies<S::AHEAD>",
        "two_shot",
        PLAIN,
    ),
    Fault(
        "a slot is filled again before it was read",
        KERNEL,
        "ptx::copy_async(slot(i % S::AHEAD * S::SOURCES + source),",
        "ptx::copy_async(slot((i + 1) % S::AHEAD * S::SOURCES + source),",
        "post_norm",
        PLAIN,
    ),
    Fault(
        "the residual's slots are too few",
        KERNEL,
        "(S::has(POST_NORM) ? i : i % S::AHEAD)",
        "i % S::AHEAD",
        "post_norm",
        PLAIN,
    ),
    Fault(
        "the residual of the next row is not fetched",
        KERNEL,
        "copy_residual(row + stride, i);",
        "copy_residual(row, i);",
        "post_norm",
        PLAIN,
    ),
    Fault("warps' sums do not take turns", KERNEL, "    set ^= 1;\n", "", "listed", THREAD),
    Fault(
        "warps do not wait for each other's sums",
        KERNEL,
        "    ptx::sync_some(1 + group, S::THREADS_PER_ROW);\n",
        "",
        "post_norm",
        THREAD,
    ),
    # -- sums
    Fault(
        "the last rank's rows are left out",
        KERNEL,
        "for (int peer = 0; peer < S::WORLD; ++peer) ptx::store",
        "for (int peer = 0; peer < S::WORLD - 1; ++peer) ptx::store",
        "two_shot",
        PLAIN,
    ),
    Fault(
        "every rank starts to sum at itself",
        KERNEL,
        "add(total, Element::widen(*slot(i % S::AHEAD * S::SOURCES + source)));",
        "add(total, Element::widen(*slot(i % S::AHEAD * S::SOURCES + (source + rank) % S::SOURCES)));",
        "one_shot",
        PLAIN,
    ),
    Fault(
        "squares of before the residual",
        KERNEL,
        "    squares = 0;\n    each_vector",
        "    each_vector",
        "post_norm",
        PLAIN,
    ),
    # -- giving up
    Fault(
        "the report names the rank itself",
        BARRIER,
        "return give_up(TIMEOUT, peer, expected, seen);",
        "return give_up(TIMEOUT, rank, expected, seen);",
        "dead",
        PLAIN,
    ),
    Fault(
        "nobody counts the time",
        BARRIER,
        "> static_cast<i64>(place.timeout_ns)",
        "> static_cast<i64>(~0ull >> 1)",
        "dead, hurried",
        PLAIN,
    ),
    Fault(
        "giving up leaves no trace",
        BARRIER,
        "for (int r = 0; r < WORLD; ++r) ptx::store_release",
        "for (int r = 0; r < 0; ++r) ptx::store_release",
        "dead, hurried",
        PLAIN,
    ),
    Fault(
        "who gives up tells itself alone",
        BARRIER,
        "for (int r = 0; r < WORLD; ++r) ptx::store_release",
        "for (int r = rank; r <= rank; ++r) ptx::store_release",
        "asked, hurried",
        PLAIN,
    ),
    Fault("nobody looks at what the host asks", BARRIER, "&& asked())", "&& false)", "asked, hurried", PLAIN),
    Fault(
        "the host is looked at once",
        BARRIER,
        "looks % LOOKS_PER_ASK == 0",
        "looks == LOOKS_PER_ASK",
        "asked, hurried",
        PLAIN,
    ),
    Fault(
        "the host's word is loaded like any other",
        BARRIER,
        "return ptx::load_acquire(&place.report[ptx::virtual_rank()].asked);",
        "return place.report[ptx::virtual_rank()].asked;",
        "asked",
        THREAD,
    ),
    Fault(
        "what the host asks is reported as a timeout",
        BARRIER,
        "return give_up(ASKED,",
        "return give_up(TIMEOUT,",
        "asked",
        PLAIN,
    ),
    Fault(
        "those who are told take the teller for the rank it waited for",
        BARRIER,
        "rank << 16 | peer;",
        "peer << 16 | rank;",
        "asked",
        PLAIN,
    ),
    Fault(
        "who waits does not hear that others gave up",
        BARRIER,
        "      if (aborted()) return false;\n",
        "",
        "odd blocks, hurried",
        PLAIN,
    ),
)
