"""tokenweave: tensor-parallel LLM inference that hides its communication."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenweave.llm import LLM
    from tokenweave.outputs import CompletionOutput, RequestOutput
    from tokenweave.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]
__version__ = "0.1.0"

_MODULES = {
    "LLM": "llm",
    "CompletionOutput": "outputs",
    "RequestOutput": "outputs",
    "SamplingParams": "sampling_params",
}


def __getattr__(name: str) -> Any:
    """What __all__ names, imported when first asked for: torch takes seconds, and `tokenweave plan` does without."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
