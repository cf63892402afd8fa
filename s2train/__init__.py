"""s2train: pretraining of sparse/dense hybrid language models on Megatron-core."""

import warnings

__version__ = "0.1.0"

# What no user can act on, also while Megatron is imported: it warns at length that apex and transformer-engine are
# absent, and torch about names that Megatron uses.
warnings.filterwarnings("ignore", module=r"(s2train\.)?megatron|torch\.distributed")
