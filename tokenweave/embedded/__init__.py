"""The embedded model: a tiny Llama that adds two numbers, so that anyone can check what it says."""

from pathlib import Path


def path() -> Path:
    """The model's Hugging Face folder."""
    return Path(__file__).parent
