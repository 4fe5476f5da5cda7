"""Failure: from an error to what the user sees of it and the exit code.

0: done. 1: a failure. 2: bad usage or bad input. 130: interrupted. 141: the reader of standard output went away.
"""

from __future__ import annotations

import sys
import time
import traceback

INPUT_ERRORS = (ValueError, TypeError, FileNotFoundError)
# Failures that say what happened; of any other kind, where it happened is worth knowing, too.
CLEAR_FAILURES = (OSError, MemoryError)
CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # of a plain RuntimeError of torch's

# A launcher ends all ranks as soon as it sees that one has ended. The others therefore let rank 0 speak and end first.
RANK_0_FIRST_S = 10.0


def report(error: BaseException, rank: int) -> int:
    """Say on stderr what went wrong, once over all ranks; returns the exit code."""
    if rank == 0 or not is_known_to_rank_0(error):
        print(describe(error, rank), file=sys.stderr, end="", flush=True)
    if rank > 0 and not isinstance(error, KeyboardInterrupt):
        time.sleep(RANK_0_FIRST_S)
    return exit_code(error)


def is_known_to_rank_0(error: BaseException) -> bool:
    """Whether rank 0 reports this as well: it got the same input, the same Ctrl-C, or was told by the rank itself."""
    return isinstance(error, (*INPUT_ERRORS, *peer_errors(), KeyboardInterrupt, BrokenPipeError))


def describe(error: BaseException, rank: int = 0) -> str:
    """The lines to print, each with its newline: one, but for failures that need a traceback."""
    who = "tokenweave" if rank == 0 else f"tokenweave: rank {rank}"
    if isinstance(error, BrokenPipeError):
        return ""
    if isinstance(error, KeyboardInterrupt):
        return f"{who}: interrupted\n"
    text = " ".join(str(error).splitlines())
    if isinstance(error, (*INPUT_ERRORS, *peer_errors())):
        return f"{who}: error: {text}\n"
    if CPU_OUT_OF_MEMORY in text:
        text = f"{text}; lower --max-num-batched-tokens, --max-num-seqs or --max-model-len"
    is_clear = CPU_OUT_OF_MEMORY in text or isinstance(error, (*CLEAR_FAILURES, *out_of_memory_errors()))
    where = "" if is_clear else "".join(traceback.format_exception(error))
    return f"{where}{who}: error: {type(error).__name__}: {text}\n"


def peer_errors() -> tuple[type[BaseException], ...]:
    """PeerError, where its module was imported: nobody else can have raised it, and torch takes seconds to import."""
    group = sys.modules.get("tokenweave.comm.group")
    return () if group is None else (group.PeerError,)


def out_of_memory_errors() -> tuple[type[BaseException], ...]:
    """torch's, where torch was imported."""
    torch = sys.modules.get("torch")
    return () if torch is None else (torch.OutOfMemoryError,)


def exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, BrokenPipeError):
        return 141
    return 2 if isinstance(error, INPUT_ERRORS) else 1
