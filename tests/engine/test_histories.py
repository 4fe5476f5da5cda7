"""What ranks keep of the tokens that penalties count: the same as if each step told all of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tokenweave.engine.histories import Histories, Slots, history_arrays
from tokenweave.engine.sampler import History, SamplingRow, sample
from tokenweave.engine.upload import upload

CPU, VOCABULARY = torch.device("cpu"), 30


@dataclass
class Text:
    """A sequence that is drawn token by token, and what ranks were told of it."""

    slot: int
    tokens: list[int]
    told: int = 0
    late: int | None = None  # where among the last tokens drawn its last one is, if it is not in `tokens` yet
    prompt_len: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_len = len(self.tokens)

    def news(self) -> History:
        history = History(self.slot, self.told, tuple(self.tokens[self.told :]), self.late, self.prompt_len)
        self.told = history.known
        return history

    def whole(self, slot: int) -> History:
        return History(slot, 0, tuple(self.tokens), self.late, self.prompt_len)


def row(history: History) -> SamplingRow:
    return SamplingRow(repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2, history=history)


@given(st.data())
@settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.generate])  # no search for a shorter failure
def test_as_if_each_step_told_all(data):
    """Texts start, pause, end and leave their slots to others; the last token is late, or is not."""
    kept, slots, texts, previous = Histories(CPU), Slots(), [], torch.zeros(0, dtype=torch.long)
    for step in range(12):
        while len(texts) < 4 and data.draw(st.booleans()):
            prompt = data.draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=20))
            texts.append(Text(slots.take(), prompt))
        now = [text for text in texts if text.late is not None or data.draw(st.integers(0, 3))]
        logits = torch.randn(len(now), VOCABULARY, generator=torch.Generator().manual_seed(step))
        wholes = [row(text.whole(i)) for i, text in enumerate(now)]
        drawn = sample(logits, [row(text.news()) for text in now], previous, kept).token_ids
        assert drawn.equal(sample(logits, wholes, previous).token_ids)
        for text in now:
            if text.late is not None:
                text.tokens.append(int(previous[text.late]))
        previous = drawn
        for i, text in enumerate(now):
            text.late = i if data.draw(st.booleans()) else None
            if text.late is None:
                text.tokens.append(int(drawn[i]))
        for text in [text for text in texts if text.late is None and not data.draw(st.integers(0, 3))]:
            texts.remove(text)
            slots.give_back(text.slot)
    assert slots.most <= 4


def told(histories: Histories, *news: History) -> None:
    histories.take_in(news, upload(history_arrays(news), CPU), None)


def test_room_grows_and_keeps_what_there_is():
    histories = Histories(CPU)
    told(histories, History(0, 0, (5, 6)), History(1, 0, (7,)))
    told(histories, History(6, 0, tuple(range(20))), History(1, 1, (8, 9)))
    assert histories.tokens.shape == (8, 32)
    assert histories.read(torch.tensor([0, 1]), 2).tolist() == [[5, 6], [7, 8]]
    assert histories.read(torch.tensor([6]), 20).tolist() == [list(range(20))]


def test_a_late_token_without_a_step_before():
    rows = [row(History(0, 0, (1,), late=0))]
    with pytest.raises(AssertionError):
        sample(torch.zeros(1, 5), rows)


def test_the_lowest_free_slot_is_taken():
    slots = Slots()
    assert [slots.take() for _ in range(4)] == [0, 1, 2, 3]
    slots.give_back(2)
    slots.give_back(0)
    assert [slots.take() for _ in range(3)] == [0, 2, 4]
