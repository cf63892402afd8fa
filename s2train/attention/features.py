"""Features of attention that a run or a program can ask for.

They are asked of every layer's attention; a kind may lack them.
"""

from enum import Enum


class Feature(Enum):
    """A feature that a kind of attention supports or not.

    The value is its name in messages.
    """

    TENSOR_PARALLEL = "tensor parallel ranks"
    SHARED_KV_HEADS = "more tensor parallel ranks than KV heads"
    SEQUENCE_PARALLEL = "sequence parallel ranks"
    PIPELINE_PARALLEL = "pipeline parallel ranks"
    CONTEXT_PARALLEL = "context parallel ranks"
    PACKED_DOCUMENTS = "attention within documents"
    RECOMPUTATION = "recomputation"
    TRANSFORMER_ENGINE = "transformer-engine's layers"
    FP8 = "FP8 layers"
    DETERMINISTIC = "deterministic training"
    DECODING = "decoding"
    EXPORT = "export to Hugging Face's format"
    PICTURES = "pictures of its layout"


ALL_FEATURES = frozenset(Feature)
