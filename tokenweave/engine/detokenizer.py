"""Token ids to text, a token at a time."""

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are not (yet) UTF-8
CONTEXT_TOKENS = 5  # at least as many bytes, more than a UTF-8 character has
MAX_PENDING_TOKENS = 16


class Detokenizer:
    """The text of one sequence's output, decoded incrementally; work per token does not grow with the output.

    Only a window of tokens is decoded: `context`, whose text is out, and `pending`, whose text is not. The context
    settles whether the first pending token begins with a space. Text that ends in U+FFFD may be half a character and is
    held back. The pushed pieces together are decode(prompt + output) behind decode(prompt), without clean-up of spaces;
    a character that the prompt leaves unfinished belongs to the output.

    Tokenizers with byte fallback turn a whole run of byte tokens into U+FFFD when any part of it is invalid. Characters
    of such a run that were complete when they were pushed stay: text that is out is never taken back.
    """

    def __init__(self, tokenizer: Any, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        """tokenizer: anything with the `decode` of a transformers tokenizer."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        tail = self._tail(prompt_token_ids)
        finished = len(tail) - self._unfinished_tokens(tail)
        self._context, self._pending = tail[:finished], tail[finished:]
        self._out_chars = len(self._decode(self._context).rstrip(REPLACEMENT))  # of the window's text
        self._prompt_text: str | None = self._decode(tail)  # None as soon as output is out
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All text that is out."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def push(self, token_id: int) -> str:
        """Text that this token makes certain, possibly empty."""
        self._pending.append(token_id)
        text = self._decode(self._context + self._pending)
        certain = text.rstrip(REPLACEMENT)
        if len(self._pending) > MAX_PENDING_TOKENS and len(certain) < len(text):
            certain = text[:-1]  # no character is this long: the bytes are invalid, but for the last few
        piece = self._emit(certain)
        self._slide(token_id, text, certain, piece)
        return piece

    def finish(self, token_ids: Sequence[int] = ()) -> str:
        """What was held back, and the text of the last `token_ids`, as far as it decodes."""
        self._pending += token_ids
        piece = self._emit(self._decode(self._context + self._pending))
        self._context, self._pending = self._context + self._pending, []
        return piece

    def _emit(self, certain: str) -> str:
        if self._prompt_text is not None and certain.startswith(self._prompt_text):
            # If the prompt ends in U+FFFD, that has turned out to be no half character.
            self._out_chars = len(self._prompt_text)
        piece = certain[self._out_chars :]
        self._out_chars = max(self._out_chars, len(certain))
        self._prompt_text = None if piece else self._prompt_text
        self._pieces.append(piece)
        return piece

    def _slide(self, token_id: int, text: str, certain: str, piece: str) -> None:
        """Move the window on when a character ends where this token ends, or when the window has grown long."""
        if piece and certain == text:
            self._start_behind(self._pending, held_chars=0)
        elif not piece and self._invisible(token_id):
            self._pending.pop()
        elif len(self._pending) > MAX_PENDING_TOKENS:
            self._start_behind(self._pending[-CONTEXT_TOKENS:], held_chars=len(text) - len(certain))

    def _start_behind(self, context: list[int], held_chars: int) -> None:
        self._context, self._pending = context, []
        self._out_chars = len(self._decode(context)) - held_chars

    def _invisible(self, token_id: int) -> bool:
        """True for a token without text in any context, like a skipped special token; a space has text in some."""
        return self._decode([token_id, token_id]) == ""

    def _tail(self, token_ids: Sequence[int]) -> list[int]:
        """Enough of the prompt's end to have text and to begin with a whole character."""
        count = CONTEXT_TOKENS
        while count < len(token_ids):
            tail = list(token_ids[-count:])
            text = self._decode(tail)
            if text and not text.startswith(REPLACEMENT):
                return tail
            count *= 2
        return list(token_ids)

    def _unfinished_tokens(self, token_ids: list[int]) -> int:
        """How many tokens at the end may be the bytes (three at most) of an unfinished character."""
        starts = (self._decode(token_ids[: len(token_ids) - count]) for count in range(4))
        return next((count for count, start in enumerate(starts) if not start.endswith(REPLACEMENT)), 0)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(
            token_ids, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )
