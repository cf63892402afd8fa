"""HyperAttention: strictly causal, near-linear attention by hashing and sampling."""

from .op import hyper_attention
from .reference import reference_hyper_attention
from .settings import HyperSettings

__all__ = ["HyperSettings", "hyper_attention", "reference_hyper_attention"]
