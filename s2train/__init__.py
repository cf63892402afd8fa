"""s2train: pretraining of sparse/dense hybrid language models on Megatron-core."""

import warnings

__version__ = "0.1.0"

# What no user can act on, also while Megatron is imported: it warns at length that apex and transformer-engine are
# absent, torch about names that Megatron uses, and FlashAttention-4's compiler about arguments of FlashAttention-4.
warnings.filterwarnings("ignore", module=r"(s2train\.)?megatron|torch\.distributed|cutlass\.base_dsl")
