import inspect
from dataclasses import dataclass

import pytest

from tokenweave.keywords import check_keywords, known_keywords


@known_keywords
@dataclass(frozen=True, kw_only=True)
class Options:
    block_size: int = 16
    max_model_len: int | None = None


def test_known_keywords_pass_and_the_signature_stays():
    assert Options(block_size=4) == Options(block_size=4, max_model_len=None)
    assert list(inspect.signature(Options).parameters) == ["block_size", "max_model_len"]


def test_an_unknown_keyword_names_the_nearest():
    with pytest.raises(TypeError, match=r"^Options has no option 'blocksize'; did you mean 'block_size'\?$"):
        Options(blocksize=4)


def test_an_unknown_keyword_near_none_lists_all():
    with pytest.raises(TypeError, match=r"^LLM has no option 'zzz'; the options are device, dtype$"):
        check_keywords("LLM", ["dtype", "zzz"], ["dtype", "device"])
