"""s2train: pretraining of sparse/dense hybrid language models on Megatron-core."""

__version__ = "0.1.0"
