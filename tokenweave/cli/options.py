"""Options: command-line options made from the fields of a dataclass, which alone states types and defaults."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

SAME = object()  # the default is the dataclass's
MOST = 1e9  # seconds, milliseconds, requests a second: more than any clock here can count


@dataclass(frozen=True)
class Option:
    """How one field of a dataclass is set on the command line. name: of the option, the field's name if empty. short:
    another name for it.

    A bool that is true by default gets the option --no-NAME; one that may be None, --NAME and --no-NAME.
    """

    field: str
    help: str
    metavar: str | None = None
    name: str = ""
    short: str = ""
    default: Any = SAME
    choices: tuple[str, ...] | None = None

    @property
    def dest(self) -> str:
        return self.name or self.field


def add_options(group: Any, cls: type, options: Iterable[Option]) -> None:
    """Add every option to an argparse group."""
    defaults, hints = {field.name: field.default for field in fields(cls)}, get_type_hints(cls)
    for option in options:
        default = defaults[option.field] if option.default is SAME else option.default
        add_option(group, option, default, hints[option.field])


def add_option(group: Any, option: Option, default: Any, hint: Any) -> None:
    if hint is bool:
        name, action = (f"no-{option.dest}", "store_false") if default else (option.dest, "store_true")
        group.add_argument(flag(name), dest=option.dest, action=action, help=option.help)
        return
    if bool in get_args(hint):
        keywords: dict[str, Any] = {"default": default, "action": argparse.BooleanOptionalAction}
        group.add_argument(flag(option.dest), dest=option.dest, help=option.help, **keywords)
        return
    shown = "" if default is None else " (default: %(default)s)"
    keywords = how_to_read(hint) | ({"choices": option.choices} if option.choices else {"metavar": option.metavar})
    flags = [flag(name) for name in (option.short, option.dest) if name]
    group.add_argument(*flags, dest=option.dest, default=default, help=option.help + shown, **keywords)


def flag(name: str) -> str:
    """--two-words; but -n, as everywhere, and because torchrun takes --n of the program it runs for one of its own."""
    return f"{'-' if len(name) == 1 else '--'}{name.replace('_', '-')}"


def how_to_read(hint: Any) -> dict[str, Any]:
    """argparse's keywords for a field's type: int, float and str, each perhaps with None, and sequences of them."""
    members = get_args(hint) or (hint,)
    for kind in (int, str):
        if Sequence[kind] in members:  # type: ignore[valid-type]
            return {"type": kind, "action": "append"}
    (kind,) = (member for member in members if member is not NoneType)
    return {"type": or_none(kind) if NoneType in members else kind}


def or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Reads what `kind` reads, and the word none."""

    def read(text: str) -> Any:
        return None if text == "none" else kind(text)

    read.__name__ = f"{kind.__name__} or none"  # type: ignore[attr-defined]  # argparse's messages name it
    return read


def positive(text: str, least: int = 1) -> int:
    """Raises argparse's error for anything but a whole number from `least` on."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number >= {least}, got {text!r}")
    return int(text)


def above_zero(text: str) -> float:
    """Raises argparse's error for anything but a number > 0 up to MOST."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= MOST:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number > 0 and at most {MOST:g}, got {text!r}")


def chosen(namespace: argparse.Namespace, options: Iterable[Option]) -> dict[str, Any]:
    """{field: value}, to make the dataclass from."""
    return {option.field: getattr(namespace, option.dest) for option in options}
