"""Choice: how a step is run."""

from __future__ import annotations

from dataclasses import dataclass

MODES = ("off", "fused", "weave", "nocomm")


@dataclass(frozen=True)
class Choice:
    """off: all-reduce, then residual + norm of all rows | fused: one kernel does it all | weave: two halves, the second
    from row `cut` on, whose fused kernels take so many SMs after attention and after the MLP | nocomm: off without the
    sums. Raises ValueError for another mode, and for a weave that does not say cut and SMs."""

    mode: str = "off"
    cut: int | None = None
    attention_sms: int | None = None
    mlp_sms: int | None = None

    def __post_init__(self) -> None:
        check_mode(self.mode)
        if self.mode == "weave" and None in (self.cut, self.attention_sms, self.mlp_sms):
            raise ValueError(f"mode 'weave' needs cut, attention_sms and mlp_sms, got {self}")


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
