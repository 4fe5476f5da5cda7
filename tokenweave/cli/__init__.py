"""The `tokenweave` command."""

from tokenweave.cli.entry import main

__all__ = ["main"]
