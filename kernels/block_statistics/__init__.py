"""Streamed statistics of attention per pair of query and key block.

They are the key block's probability, and the effect of its removal.
"""

from .effects import block_effects, output_delta, rule_effects
from .mass import block_mass

__all__ = ["block_effects", "block_mass", "output_delta", "rule_effects"]
