"""tokenweave: tensor-parallel LLM inference that hides its communication."""

from tokenweave.llm import LLM
from tokenweave.outputs import CompletionOutput, RequestOutput
from tokenweave.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]
__version__ = "0.1.0"
