"""s2train: pretraining of sparse/dense hybrid language models on Megatron-core."""

import logging
import warnings

__version__ = "0.1.0"

# What no user can act on, also while Megatron is imported: it warns at length that apex and transformer-engine are
# absent, torch about names that Megatron uses, and FlashAttention-4's compiler about arguments of FlashAttention-4.
warnings.filterwarnings("ignore", module=r"(s2train\.)?megatron|torch\.distributed|cutlass\.base_dsl")
# Python names the file of a syntax that it warns about, where it has no byte code of it yet.
warnings.filterwarnings("ignore", category=SyntaxWarning, module=r".*[/\\]megatron[/\\]core[/\\]")
# Errors are still logged. Megatron logs for each model that GPTModel is deprecated. A module of torch that it imports
# logs in each process that there is no GPU: `check_gpus` rejects that where it is a mistake.
logging.getLogger("megatron").setLevel(logging.ERROR)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
