"""Statistics of attention per (query block, key block), streamed: probability, effect of removal."""

from .effects import block_effects, output_delta, rule_effects
from .mass import block_mass

__all__ = ["block_effects", "block_mass", "output_delta", "rule_effects"]
