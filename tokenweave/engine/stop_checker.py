"""Stop strings in streamed text."""

from collections.abc import Sequence


class StopChecker:
    """Passes text on until a stop string is complete; never passes on what may turn out to be the beginning of one.

    Of several stop strings the first to be complete counts, and of those the longest, so that the result does not
    depend on how the text is cut into pieces.
    """

    def __init__(self, stop: Sequence[str] = (), include_stop_str: bool = False) -> None:
        """include_stop_str: pass the stop string on, too."""
        self.matched: str | None = None
        self._stop = tuple(stop)
        self._include_stop_str = include_stop_str
        self._held = ""

    def push(self, new_text: str, scan: bool = True) -> str:
        """Text that can be passed on. Sets `matched` to the stop string, if one ends in new_text; nothing follows it.

        scan: False while min_tokens are not out; a stop string that ends in new_text is then ordinary text.
        """
        if self.matched is not None:
            return ""
        old_chars, text = len(self._held), self._held + new_text
        end = self._first_end(text, old_chars) if scan else None
        if end is None:
            return self._pass_on(text)
        return self._cut(text[:end])

    def finish(self) -> str:
        """What was held back: at the end of the text it is the beginning of nothing."""
        held, self._held = self._held, ""
        return held

    def _first_end(self, text: str, old_chars: int) -> int | None:
        """Where the first stop string that ends behind old_chars ends."""
        ends = []
        for stop in self._stop:
            start = text.find(stop, max(0, old_chars - len(stop) + 1))
            if start >= 0:
                ends.append(start + len(stop))
        return min(ends, default=None)

    def _cut(self, text: str) -> str:
        """text ends with a stop string."""
        self.matched = max((stop for stop in self._stop if text.endswith(stop)), key=len)
        self._held = ""
        return text if self._include_stop_str else text.removesuffix(self.matched)

    def _pass_on(self, text: str) -> str:
        held_chars = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held_chars :]
        return text[: len(text) - held_chars]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is a beginning of stop, but not all of it."""
    return next(size for size in range(min(len(stop) - 1, len(text)), -1, -1) if text.endswith(stop[:size]))
