"""Settings that scale RoPE's frequencies for sequences beyond the training length."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass
class RopeScalingConfig:
    """Scaling of RoPE for longer sequences.

    Each kind takes some of the settings and rejects the others. None: the kind's default.
    """

    # none, linear (position interpolation, arXiv 2306.15595), yarn (arXiv 2309.00071), llama3 (Llama 3.1's)
    kind: str = "none"
    factor: float | None = None  # longest length over the original one, more than 1
    original_length: int | None = None  # for yarn and llama3: tokens of the sequences before the scaling
    # for yarn: keep frequencies that make more turns than this within original_length; None: 32
    beta_fast: float | None = None
    # for yarn: divide frequencies that make fewer turns than this by the factor; None: 1
    beta_slow: float | None = None
    # for yarn: cosines and sines are multiplied by it, attention scores by its square; None: 0.1 ln(factor) + 1
    attention_factor: float | None = None
    truncate: bool | None = None  # for yarn: round the range between the betas to whole dimensions; None: true
    low_freq_factor: float | None = None  # for llama3, as beta_slow; None: 1
    high_freq_factor: float | None = None  # for llama3, as beta_fast; None: 4

    @property
    def given(self) -> dict[str, Any]:
        """The settings that are set, without the kind."""
        return {name: value for name, value in asdict(self).items() if name != "kind" and value is not None}

    @property
    def temperature(self) -> float:
        """The factor of RoPE's cosines and sines.

        For yarn it is sqrt(1 / t) of equation 22, for the other kinds 1.
        """
        if self.kind != "yarn":
            return 1.0
        assert self.factor is not None
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor


REQUIRED: dict[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_length"),
    "llama3": ("factor", "original_length"),
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "none": {},
    "linear": {},
    "yarn": {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None, "truncate": True},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


def with_defaults(scaling: RopeScalingConfig) -> RopeScalingConfig:
    """Fill in the defaults of the kind."""
    filled = replace(scaling, **DEFAULTS[scaling.kind] | scaling.given)
    return replace(filled, attention_factor=scaling.temperature) if scaling.kind == "yarn" else filled
