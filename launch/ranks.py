"""torchrun for people: the same arguments, but what went wrong in one line instead of two reports and a traceback.

LOGLEVEL, which is torchrun's own variable, brings torchrun's messages back.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run


def describe(rank: int, failure: ProcessFailure) -> str:
    """What ended a rank, in one line."""
    if failure.exitcode >= 0:
        return f"rank {rank} exited with code {failure.exitcode}; what it reported is above"
    hint = "; out of memory?" if -failure.exitcode == signal.SIGKILL else ""
    return f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}{hint}"


def exit_code(failure: ProcessFailure) -> int:
    """A shell's code for it: that of the rank, or 128 + the signal that ended it."""
    return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode


def main() -> int:
    """Run the ranks to their end and return the exit code of the first that failed, else 0."""
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"tokenweave: {describe(rank, failure)}", file=sys.stderr)
        return exit_code(failure)
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
