"""Register exports' model, configuration and checks with vLLM.

vLLM calls `register` in each of its processes (entry point group vllm.general_plugins), whatever it serves. The KV
cache spec registers itself where it is first needed: importing it here would load much of vLLM.
"""

from s2train.serving.versions import TESTED

ARCHITECTURE, MODEL_TYPE = "S2ForCausalLM", "s2_llama"


def register() -> None:
    """Register everything that `vllm serve EXPORT` needs.

    It may run several times in a process. If this version of vLLM lacks a part, log it and register nothing: vLLM still
    serves other models.
    """
    import vllm
    from vllm.logger import init_logger

    try:
        _register()
    except Exception as error:  # vLLM calls this whatever it serves
        logger, tested = init_logger("vllm.s2train"), ", ".join(TESTED)
        problem = "s2train's exports can't be served: vLLM %s lacks a part (%s). Install one of %s"
        logger.warning(problem, vllm.__version__, error, tested)


def _register() -> None:
    from transformers import AutoConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    from s2train.checkpoints.hugging_face.modeling_s2 import S2Config
    from s2train.serving.checks import ServingChecks

    AutoConfig.register(MODEL_TYPE, S2Config, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, "s2train.serving.model:S2ForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = ServingChecks
