"""The options of a simulated link."""

from __future__ import annotations

import argparse
from typing import Any

from tokenweave.cli.parser import UsageError
from tokenweave.comm.link import Link


def add_link(group: Any) -> None:
    group.add_argument(
        "--link-gbit-per-s",
        type=float,
        metavar="X",
        help="simulate a link: slow communication down to X Gbit/s (CPU only; the times shown are then simulated)",
    )
    group.add_argument(
        "--link-latency-us",
        type=float,
        default=0.0,
        metavar="Y",
        help="of the simulated link, microseconds (default: %(default)s)",
    )


def link(options: argparse.Namespace) -> Link | None:
    if options.link_gbit_per_s is None:
        if options.link_latency_us:
            raise UsageError("--link-latency-us is of a simulated link; give --link-gbit-per-s as well")
        return None
    return Link(options.link_gbit_per_s * 1e9 / 8, options.link_latency_us / 1e6)
