"""What a step takes: predictions without weights, GPUs or clocks."""

from tokenweave.cost.predict import predict_decode, predict_prefill

__all__ = ["predict_decode", "predict_prefill"]
