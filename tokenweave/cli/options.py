"""Options: command-line options made from the fields of a dataclass, which alone states types and defaults."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

SAME = object()  # the default is the dataclass's


@dataclass(frozen=True)
class Option:
    """How one field of a dataclass is set on the command line. name: of the option, the field's name if empty.

    A field that is true by default gets the option --no-NAME; one that may be None, --NAME and --no-NAME.
    """

    field: str
    help: str
    metavar: str | None = None
    name: str = ""
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
    flag = option.dest.replace("_", "-")
    if hint is bool:
        flag, action = (f"no-{flag}", "store_false") if default else (flag, "store_true")
        group.add_argument(f"--{flag}", dest=option.dest, action=action, help=option.help)
        return
    if bool in get_args(hint):
        keywords: dict[str, Any] = {"default": default, "action": argparse.BooleanOptionalAction}
        group.add_argument(f"--{flag}", dest=option.dest, help=option.help, **keywords)
        return
    shown = "" if default is None else " (default: %(default)s)"
    keywords = how_to_read(hint) | ({"choices": option.choices} if option.choices else {"metavar": option.metavar})
    group.add_argument(f"--{flag}", dest=option.dest, default=default, help=option.help + shown, **keywords)


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


def chosen(namespace: argparse.Namespace, options: Iterable[Option]) -> dict[str, Any]:
    """{field: value}, to make the dataclass from."""
    return {option.field: getattr(namespace, option.dest) for option in options}
