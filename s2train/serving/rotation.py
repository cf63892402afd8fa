"""RoPE of an export, in vLLM's form."""

from typing import Any


def rope_parameters(config: Any) -> dict[str, Any]:
    """Return what vLLM's `get_rope` takes, scaling included.

    vLLM 0.24 doesn't read YaRN's `attention_factor`: it multiplies its own, 0.1 ln(factor) + 1, by `attn_factor`.

    Args:
        config: the export's, whose `rope_parameters` is in Hugging Face's form, if RoPE is scaled.
    """
    scaling = dict(getattr(config, "rope_parameters", None) or {})
    if (factor := scaling.pop("attention_factor", None)) is not None:
        scaling |= {"apply_yarn_scaling": False, "attn_factor": factor}
    plain = {"rope_theta": config.rope_theta, "partial_rotary_factor": config.partial_rotary_factor}
    return {"rope_type": "default"} | scaling | plain
