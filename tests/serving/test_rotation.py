"""vLLM rotates queries and keys as the export's own file does."""

from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from s2train.checkpoints.hugging_face.modeling_s2 import S2Config, rotate, scaled_frequencies
from s2train.serving.rotation import rope_parameters

YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 4.0},
        YARN,
        YARN | {"attention_factor": 1.3},
        YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False},
        LLAMA3,
    ],
)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_queries_and_keys_rotate_as_in_the_exports_file(scaling: dict[str, Any] | None, share: float) -> None:
    config = S2Config(
        hidden_size=128, num_attention_heads=4, head_dim=32, partial_rotary_factor=share, rope_parameters=scaling
    )
    q, k = torch.randn(2, 200, 4, 32)
    positions = torch.arange(200)
    with set_current_vllm_config(VllmConfig()):
        rotation = get_rope(32, max_position=256, rope_parameters=rope_parameters(config), dtype=torch.float32)
        found = rotation.forward_native(positions, q.flatten(1).clone(), k.flatten(1).clone())
    frequencies, factor = scaled_frequencies(config, q.device)
    angles = torch.outer(positions.float(), frequencies).repeat(1, 2)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    for x, rotated in zip((q, k), found, strict=True):
        torch.testing.assert_close(rotated.unflatten(1, (4, 32)).transpose(0, 1), rotate(x.transpose(0, 1), cos, sin))
