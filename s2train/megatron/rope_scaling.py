"""Megatron's own scaled rotary embeddings, by `model.rope_scaling`."""

import math
from typing import Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from s2train.config import ModelConfig
from s2train.rope_scaling import with_defaults


class YarnAngles(nn.Module):
    """Megatron's YaRN with the interface of its plain rotary embedding.

    It returns angles alone. Megatron's attention, and our `Rotation`, take YaRN's temperature from the configuration.
    """

    def __init__(self, yarn: YarnRotaryEmbedding) -> None:
        super().__init__()
        self.yarn = yarn
        del yarn.cos_cached, yarn.sin_cached  # for multi-latent attention: large, and unused here

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute angles, fp32 [s, 1, 1, r]."""
        angles: Tensor = self.yarn(*args, **kwargs)[0]
        return angles

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """Return Megatron's number of positions."""
        return int(self.yarn.get_rotary_seq_len(*args, **kwargs))


def set_temperature(config: TransformerConfig, model: ModelConfig) -> None:
    """Set the attributes that determine YaRN's factor of cosines and sines.

    Megatron's attention computes the factor as 0.1 · mscale · ln(factor) + 1. Call this before layers are built, since
    they may keep the factor.
    """
    scaling = model.rope_scaling
    if scaling.kind != "yarn":
        return
    assert scaling.factor is not None
    given: Any = config  # Megatron reads these by name; they are no fields
    given.yarn_rotary_scaling_factor = scaling.factor
    given.yarn_mscale = (scaling.temperature - 1) / (0.1 * math.log(scaling.factor))
    given.yarn_mscale_all_dim = 0.0
    if scaling.temperature != 1:
        config.apply_rope_fusion = False  # transformer-engine's fused rotation has no factor


def scale_rotation(gpt: GPTModel, model: ModelConfig) -> None:
    """Give a new model the angles of `model.rope_scaling`.

    Megatron's model builds linear scaling itself. Its Llama-3 form has fixed lengths, and its YaRN ignores
    `rotary_percent`; both are built here instead.
    """
    scaling, plain = with_defaults(model.rope_scaling), gpt.rotary_pos_emb
    assert isinstance(plain, RotaryEmbedding)
    if scaling.kind == "llama3":
        plain.inv_freq = plain._apply_scaling(
            plain.inv_freq,
            scaling.factor,
            scaling.low_freq_factor,
            scaling.high_freq_factor,
            scaling.original_length,
        )
    elif scaling.kind == "yarn":
        config = gpt.config
        yarn = YarnRotaryEmbedding(
            kv_channels=2 * len(plain.inv_freq),  # those that rotate
            rotary_base=model.rotary_base,
            use_cpu_initialization=config.use_cpu_initialization,
            scaling_factor=scaling.factor,
            original_max_position_embeddings=scaling.original_length,
            beta_fast=scaling.beta_fast,
            beta_slow=scaling.beta_slow,
            mscale=config.yarn_mscale,
            mscale_all_dim=config.yarn_mscale_all_dim,
            correction_range_round_to_int=scaling.truncate,
            cp_group=plain.cp_group,
        )
        gpt.rotary_pos_emb = YarnAngles(yarn)
