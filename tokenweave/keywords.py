"""Unknown keywords are errors that name the nearest known one."""

import difflib
import functools
import inspect
from collections.abc import Iterable
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)


def check_keywords(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a one-line TypeError for the first name in `given` that is not in `known`."""
    known = list(known)
    for name in given:
        if name not in known:
            raise TypeError(f"{owner} has no option {name!r}; {_advice(name, known)}")


def known_keywords(cls: Class) -> Class:
    """Class decorator: `cls(unknown=...)` raises the TypeError of `check_keywords`; the signature stays as it was."""
    init = cls.__init__  # type: ignore[misc]
    known = list(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        check_keywords(cls.__name__, kwargs, known)
        init(self, *args, **kwargs)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


def _advice(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    if nearest:
        return f"did you mean {nearest[0]!r}?"
    return f"the options are {', '.join(sorted(known))}"
