"""Base class of core attention, which replaces Megatron's in every layer.

It holds what all kinds of attention share.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from s2train.attention.kind import LayerLayout
from s2train.attention.random_numbers import stateless_seed
from s2train.attention.weights import AttentionShape, kv_heads_on_rank
from s2train.kernels.attention import Backend
from s2train.kernels.dispatch import KernelsInUse
from s2train.kernels.layout import BlockLayout
from s2train.megatron.auxiliary_losses import Records, attach_loss
from s2train.megatron.kind_weights import KindWeights
from s2train.megatron.layout_cache import LayoutCache


class CachedChunk(Protocol):
    """Tokens [start, stop) of all sequences that a prefill writes now.

    `lengths` [b], on the host, is how many tokens of each sequence there are afterwards.
    """

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def lengths(self) -> np.ndarray: ...


class AttentionCache(Protocol):
    """One layer's keys and values while decoding; see `s2train.inference.kv_cache`."""

    max_length: int
    layout: BlockLayout | None
    state: dict[str, torch.Tensor]

    @property
    def chunk(self) -> CachedChunk | None: ...
    @property
    def positions(self) -> torch.Tensor: ...

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None: ...
    def own_blocks(self) -> torch.Tensor: ...
    def attend_listed(self, query: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor: ...
    def attend_chunk(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor: ...

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Compute attention of new tokens over the cache and themselves.

        Their queries are [s_q, b, h, d]. The layer's static layout says what they read.
        """
        ...

    def attend_each(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Compute attention by the layer's `attend`, one sequence after the other.

        Equals `attend` over all keys of each sequence.
        """
        ...


@dataclass
class PackedDocuments(PackedSeqParams):
    """A model's `packed_seq_params` for documents packed along whole sequences.

    Attributes:
        on_host: each sequence's bounds, for layers that treat documents by their lengths: they wait for no device.
        on_device: each sequence's bounds. All layers use the same tensors: kernels keep schedules by them.
        derived: what layers derive from the bounds, by what else it depends on; made in the first forward pass.
    """

    on_host: Sequence[Sequence[int]] = ()
    on_device: Sequence[torch.Tensor] = ()
    derived: dict[Any, Any] = field(default_factory=dict)


def packed_documents(bounds: torch.Tensor, seq_length: int, device: torch.device | None = None) -> PackedDocuments:
    """Make a model's `packed_seq_params` for documents packed along its sequences.

    Hidden states stay [s, b, h], and rotary positions continue across documents: rotary scores depend only on
    distances, so restricting attention is enough.

    Args:
        bounds: int32 [b, documents + 1], each row ascending from 0 to `seq_length`; documents may be empty. On the CPU
            reading them waits for no device.
        device: the model's; default: that of `bounds`.
    """
    on_device = bounds if device is None else bounds.to(device, non_blocking=True)
    return PackedDocuments(
        qkv_format="sbhd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        max_seqlen_q=seq_length,
        max_seqlen_kv=seq_length,
        on_host=bounds.tolist(),
        on_device=on_device.unbind(),
    )


class CausalCoreAttention(KindWeights, MegatronModule):
    """Causal attention of one layer; implements Megatron's core attention protocol.

    A subclass implements `attend`, and the other attend methods that its kind's features promise. Tensor parallel ranks
    hold consecutive heads. If there are more ranks than KV heads, several consecutive ranks hold the same KV head.
    Sequence parallel does not affect this class.

    Args:
        layer_layout: the layer's kind, and an upper bound of what all of its heads read.
        num_query_groups: the model's KV heads. `config` doesn't say: Megatron changes it if ranks share KV heads.
        cache: holds device layouts, shared by the layers of a model.
        backend: of the sparse op: auto, triton, portable or torch.
        seed: the run's, for initial weights and random numbers.
        cp_exchange: how sparse layers get keys from other context parallel ranks, as `parallel.cp_exchange`.
    Raises:
        NotImplementedError: attention dropout or biases.

    Attributes:
        heads: first and last + 1 of this rank's query heads within the layer.
        step: the current step, on which random numbers depend, counted from 1; 0 before training.
        loss_scale: scales gradients of auxiliary losses; the run sets it before each step.
        is_logged: whether the run logs after this step, so that a kind can record a costly value in such steps alone;
            the run sets it before each step.
        records: values of `add_loss` and `record`, summed over micro batches.
        captures_decoding: whether a CUDA graph can capture a decoding step.
        kernels: the sparse op's kernels in its first call; None before that call.
    """

    kernels: KernelsInUse | None = None
    captures_decoding = False

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        layer_layout: LayerLayout,
        num_query_groups: int,
        cache: LayoutCache,
        backend: Backend,
        seed: int,
        cp_exchange: str = "gather",
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        if attention_type != "self" or (attention_dropout or config.attention_dropout):
            raise NotImplementedError("core attention is causal self attention without dropout")
        self.layer_number = layer_number
        self.layer_layout, self.backend, self.cp_exchange = layer_layout, backend, cp_exchange
        assert config.kv_channels is not None
        self.softmax_scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.cp_group, self.tp_group = pg_collection.cp, pg_collection.tp
        local_heads = config.num_attention_heads // pg_collection.tp.size()
        first = local_heads * pg_collection.tp.rank()
        self.heads = (first, first + local_heads)
        self.num_kv_heads = kv_heads_on_rank(num_query_groups, pg_collection.tp.size())
        self.shape = AttentionShape(
            config.hidden_size, config.num_attention_heads, num_query_groups, config.kv_channels
        )
        self.cache = cache
        self.kv: AttentionCache | None = None  # attached while decoding
        self.seed, self.step, self.is_logged = seed, 0, False
        self.loss_scale: float | torch.Tensor = 1.0
        self.records = Records()
        self.make_weights(layer_layout.kind.weights(self.shape), config.params_dtype)

    @classmethod
    def compile_kernels(
        cls,
        layer: LayerLayout,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_offset: int,
        backend: Backend,
        documents: bool = False,
    ) -> None:
        """Run the layer's kernels once, so that no step compiles them.

        Called before the model exists, for each distinct layer of a data-dependent kind, if kernels are Triton's. Run
        what the layer runs in a step, forward and backward. By default nothing runs.

        Args:
            query, key, value: zeros in the shapes, strides and dtype of a step, as `attend` gets them on one tensor
                parallel rank; leaves that want gradients.
            documents: whether steps attend within documents, if the kind's features promise it.
        """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Compute attention, called by Megatron's layer.

        Args:
            query: [s_q, b, heads / tp, d], rotated; under context parallel s_q = s / cp.
            key, value: [s_k, b, KV heads of this rank, d], not expanded. Without context parallel the last query is at
                the last key's position, so that a chunk may follow cached keys.
            attention_mask, attn_mask_type: ignored; attention is causal, as its kind says.
            packed_seq_params: as made by `packed_documents`, or under context parallel by `divided_documents`.
                Attention then restarts in each document.
        Returns:
            [s_q, b, heads / tp · d].
        """
        if attention_bias is not None:
            raise NotImplementedError("attention biases are not supported")
        if packed_seq_params is not None:
            out = self.attend_documents(query, key, value, packed_seq_params)
        elif self.kv is not None:
            out = self.attend_cached(query, key, value)
        elif self.cp_group.size() == 1:
            out = self.attend(query, key, value, query_offset=key.shape[0] - query.shape[0])
        else:
            out = self.attend_across_ranks(query, key, value)
        return out.reshape(*out.shape[:2], -1)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, query_offset: int) -> torch.Tensor:
        """Compute attention of queries from position `query_offset` on.

        Queries are [s_q, b, h, d], keys [s_k, b, h_kv, d] from position 0 on. The last query is at the last key.
        Returns [s_q, b, h, d].
        """
        raise self._missing("attention")

    def attend_documents(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams
    ) -> torch.Tensor:
        """Compute attention within each document of sequences [s, b, h, d].

        Under context parallel `packed` is a `DividedDocuments`, for a kind whose features promise both.
        """
        raise self._missing("packed documents")

    def attend_across_ranks(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Compute attention of this context parallel rank's two chunks, as `attend`."""
        raise self._missing("context parallel")

    def attend_cached(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Compute attention of new tokens, as `attend`, with earlier keys in `self.kv`."""
        raise self._missing("decoding")

    def cached_layout(self, max_length: int, device: torch.device) -> BlockLayout | None:
        """Return which of this rank's keys later queries may read; None: all.

        A cache keeps exactly these.
        """
        raise self._missing("decoding")

    def cached_state(self, batch_size: int, num_blocks: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the kind's tensors in this layer's cache, by name.

        Sequences are their first dimension.
        """
        return {}

    def cached_reads(self, kv: AttentionCache, block: int, page_bytes: int) -> int:
        """Return the bytes that a new token reads from the cache.

        The token is one sequence's, in query block `block`.
        """
        layout = kv.layout
        if layout is None:
            return self.num_kv_heads * (block + 1) * page_bytes
        kept = layout.mask()[:, block, : block + 1]  # [h, blocks]
        return int(kept.unflatten(0, (self.num_kv_heads, -1)).any(1).sum()) * page_bytes

    def _missing(self, what: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self).__name__}: {what} (its kind should not promise it)")

    def random_seed(self, head: int, purpose: str = "", *, each_step: bool = True) -> int:
        """Return a random seed for one of this rank's query heads.

        It is the same under any parallel division and after a resume. It depends on run seed, layer, global head and
        `purpose`, and on the step unless `each_step` is off. All sequences of a step share it, and a recomputed forward
        pass gets the same one.
        """
        step = self.step if each_step else 0
        return stateless_seed(self.seed, step, self.layer_number, self.heads[0] + head, purpose)

    def random_generator(self, head: int, device: torch.device) -> torch.Generator:
        """Return a torch generator seeded with `random_seed`."""
        return torch.Generator(device).manual_seed(self.random_seed(head))

    def add_loss(self, out: torch.Tensor, name: str, loss: torch.Tensor) -> torch.Tensor:
        """Attach an auxiliary loss to `out` and log it.

        The backward pass of the returned tensor also sends the loss's gradient. Call this in every training forward
        pass: otherwise weights that learn only from this loss miss their gradient.

        Args:
            name: one of the kind's `columns`, with a weight.
            loss: this rank's part, a scalar: the mean over its sequences and tokens, summed over its query heads and
                divided by the number of all heads. Parts therefore add up over tensor parallel ranks and are averaged
                over micro batches and data parallel ranks, as the language model's loss is.
        """
        weight = self.layer_layout.kind.columns()[name]
        assert weight is not None, f"{name} has no weight"
        self.record(name, loss)
        return attach_loss(out, loss, weight * self.loss_scale)

    def record(self, name: str, value: torch.Tensor) -> None:
        """Log a scalar part, as in `add_loss`, from passes that get gradients.

        A recomputed forward pass counts once.
        """
        if torch.is_grad_enabled():
            self.records.add(name, value)


def cores_of(*models: torch.nn.Module) -> list[CausalCoreAttention]:
    """List the core attention of these models' layers, in order."""
    return [module for model in models for module in model.modules() if isinstance(module, CausalCoreAttention)]
