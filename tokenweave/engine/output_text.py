"""Output text: what a completion's tokens say, decoded when somebody wants to know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenweave.engine.detokenizer import Detokenizer
from tokenweave.engine.stop_checker import StopChecker
from tokenweave.sampling_params import SamplingParams


class OutputText:
    """Stop strings need the text of each token at once. Else what nobody reads before the end is decoded there in one
    piece, which takes a hundredth of the time. Only of bytes that are no text the two may make something different (see
    Detokenizer). Without a tokenizer there is no text."""

    def __init__(self, tokenizer: Any, prompt_token_ids: Sequence[int], params: SamplingParams):
        """tokenizer: as Detokenizer's, or None."""
        self._detokenizer = tokenizer and Detokenizer(tokenizer, prompt_token_ids, params.skip_special_tokens)
        self._stops = StopChecker(params.stop or (), params.include_stop_str_in_output)
        self._at_once = bool(params.stop)
        self._text = ""
        self._new: list[int] = []  # tokens that are not decoded

    def push(self, token_id: int, scan: bool) -> str | None:
        """The stop string that ends the text here, if one does. scan: look for any."""
        self._new.append(token_id)
        if self._at_once:
            self._decode(scan)
        return self._stops.matched

    def read(self) -> str:
        """All text that is certain."""
        self._decode(scan=False)
        return self._text

    def finish(self) -> None:
        """No token follows: what was held back is certain as well."""
        if self._detokenizer is not None and self._stops.matched is None:
            self._text += self._stops.push(self._detokenizer.finish(self._new), scan=False) + self._stops.finish()
        self._new = []

    def _decode(self, scan: bool) -> None:
        if self._detokenizer is not None:
            self._text += "".join(self._stops.push(self._detokenizer.push(one), scan) for one in self._new)
        self._new = []
