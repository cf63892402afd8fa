"""Register exports' model, configuration and checks with vLLM.

vLLM calls `register` in each of its processes (entry point group vllm.general_plugins). The attention backend and the
KV cache spec register themselves where they are first needed: importing them here would load much of vLLM.
"""

ARCHITECTURE, MODEL_TYPE = "S2ForCausalLM", "s2_llama"


def register() -> None:
    """Register everything that `vllm serve EXPORT` needs; may run several times in a process."""
    from transformers import AutoConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from s2train.checkpoints.hugging_face.modeling_s2 import S2Config
    from s2train.serving.checks import ServingChecks

    AutoConfig.register(MODEL_TYPE, S2Config, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, "s2train.serving.model:S2ForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = ServingChecks
    register_backend(AttentionBackendEnum.CUSTOM, "s2train.serving.backend.S2Backend")
