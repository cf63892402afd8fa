"""A paged KV cache of the blocks that later queries need."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from s2train.attention.features import Feature
from s2train.attention.kind import lacking
from s2train.errors import ConfigError
from s2train.inference.page_pool import PagePool
from s2train.kernels.decode.op import append_token, block_sparse_decode
from s2train.kernels.decode.pages import last_uses, most_pages_held, pages_held, read_tokens, write_tokens
from s2train.kernels.layout import BlockLayout
from s2train.kernels.transfer import to_device
from s2train.megatron.core_attention import CausalCoreAttention, cores_of


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, stop) that a prefill writes now.

    `lengths` [b] holds the cached lengths afterwards.
    """

    start: int
    stop: int
    lengths: np.ndarray


class KVCache:
    """Pages of all layers for `batch_size` sequences on this tensor parallel rank.

    Create it with `kv_cache`. After `lengths[i]` tokens, sequence i holds, for each KV head and layer, exactly the key
    blocks that a query at a later position needs: `bytes_in_use` counts them, `predicted_bytes` derives them from the
    layout.

    Attributes:
        lengths: int64 [b] on the host: tokens processed.
        positions: int32 [b] on the device: position of the next token, -1 for a finished sequence.
        chunk: tokens that a prefill writes now; None while decoding.
    """

    def __init__(
        self,
        cores: list[CausalCoreAttention],
        batch_size: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        first = cores[0]
        self.block_size, self.max_length = first.layer_layout.block_size, max_length
        self.num_blocks = first.layer_layout.num_blocks(max_length)
        self.layers = [LayerCache(self, number, core, batch_size, device) for number, core in enumerate(cores)]
        self.last_use = np.stack([layer.last_use.numpy() for layer in self.layers])  # [layers, H_kv, n_blocks]
        self.pool = PagePool(
            batch_size * sum(most_pages_held(layer.last_use) for layer in self.layers),
            self.block_size,
            first.shape.head_dim,
            dtype,
            device,
        )
        # Page by layer, head and block; -1 if there is none. The device's copy follows the host's.
        self.pages = np.full((batch_size, *self.last_use.shape), -1, dtype=np.int32)
        self.table = torch.full(self.pages.shape, -1, dtype=torch.int32, device=device)
        self.lengths = np.zeros(batch_size, dtype=np.int64)
        self.finished = np.zeros(batch_size, dtype=bool)
        self.positions = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.chunk: Chunk | None = None
        # Blocks sorted by last use, so that expiring ones are found without a search.
        flat = self.last_use.ravel()
        self._by_last_use = np.argsort(flat, kind="stable")
        self._expiry_bounds = np.searchsorted(flat[self._by_last_use], np.arange(self.num_blocks + 1))

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def bytes_in_use(self) -> int:
        """Bytes of used pages, counted by the free list.

        Counts all layers and sequences.
        """
        return self.pool.used * self.pool.page_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes that kinds of attention store besides keys and values.

        Counted for sequences of the full length.
        """
        return sum(state.nbytes for layer in self.layers for state in layer.state.values())

    def bytes_read(self) -> int:
        """Bytes of the cache that the next decoding step reads.

        Counts keys, values and state, in all layers and sequences.
        """
        lengths = [int(n) for n, done in zip(self.lengths, self.finished, strict=True) if not done]
        return sum(
            layer.core.cached_reads(layer, n // self.block_size, self.pool.page_bytes)
            for layer in self.layers
            for n in lengths
        )

    def predicted_bytes(self) -> int:
        """Expected `bytes_in_use`, computed from the layout and the lengths alone."""
        lengths = [int(n) for n, done in zip(self.lengths, self.finished, strict=True) if not done]
        count = sum(pages_held(layer.last_use, n, self.block_size) for n in lengths for layer in self.layers)
        return count * self.pool.page_bytes

    def dense_bytes(self) -> int:
        """Bytes that the same sequences would take if every layer kept everything."""
        blocks = sum(-(-int(n) // self.block_size) for n in self.lengths[~self.finished])
        return blocks * self.last_use.shape[0] * self.last_use.shape[1] * self.pool.page_bytes

    def begin_step(self) -> None:
        """Allocate pages for one token of every sequence.

        Raises:
            ValueError: a sequence is full.
        """
        active = np.flatnonzero(~self.finished)
        if (self.lengths[active] >= self.max_length).any():
            raise ValueError(
                f"a sequence already has {self.max_length} tokens: open the cache with a larger max_length"
            )
        indices = []
        for sequence in active[self.lengths[active] % self.block_size == 0]:
            block = int(self.lengths[sequence]) // self.block_size
            layer, head = np.nonzero(self.last_use[:, :, block] >= block)
            indices.append(np.ravel_multi_index((np.full_like(layer, sequence), layer, head, block), self.pages.shape))
        if indices:
            index = np.concatenate(indices)
            self._assign(index, self.pool.take(len(index)))

    def end_step(self) -> None:
        """Count the token, and free blocks that no later query needs."""
        self.lengths[~self.finished] += 1
        self.positions += self.positions >= 0
        size = self.last_use.size
        expired = [
            self._by_last_use[slice(*self._expiry_bounds[n // self.block_size - 1 :][:2])] + sequence * size
            for sequence, n in enumerate(self.lengths)
            if not self.finished[sequence] and n % self.block_size == 0
        ]
        if expired:
            self._free(np.concatenate(expired))

    def finish(self, sequence: int) -> None:
        """Free all pages of a sequence, and exclude it from later steps."""
        self.finished[sequence] = True
        self.positions[sequence] = -1
        size = self.last_use.size
        self._free(np.arange(sequence * size, (sequence + 1) * size))

    def end_prefill(self, lengths: np.ndarray) -> None:
        """Record that the sequences' `lengths` [b] tokens are all written."""
        self.chunk = None
        self.lengths[:] = lengths
        self.positions.copy_(torch.from_numpy(lengths.astype(np.int32)))

    def fill(self, lengths: np.ndarray) -> None:
        """Fill the cache with random keys and values.

        The cache is then as after prompts of `lengths` [b] tokens, so that the next steps can be timed.
        """
        for layer in self.layers:
            layer.keep(lengths)
        self.pool.keys.normal_()
        self.pool.values.normal_()
        self.end_prefill(lengths)

    def _free(self, index: np.ndarray) -> None:
        index = index[self.pages.reshape(-1)[index] >= 0]
        self.pool.give(self.pages.reshape(-1)[index])
        self._assign(index, np.full(len(index), -1, dtype=np.int32))

    def _assign(self, index: np.ndarray, pages: np.ndarray) -> None:
        """Write pages at flat indices of the table.

        Writes on the host and, asynchronously, on the device.
        """
        self.pages.reshape(-1)[index] = pages
        update = to_device(np.stack([index, pages.astype(np.int64)]), self.table.device)
        self.table.view(-1)[update[0]] = update[1].int()


class LayerCache:
    """One layer's part of a cache, used by its core attention.

    Attributes:
        last_use: int32 [H_kv, n_blocks] on the host: last query block that needs each key block.
        state: tensors of the kind's own, such as scores of pages, by name; the first dimension is the sequence.
    """

    def __init__(
        self, cache: KVCache, number: int, core: CausalCoreAttention, batch_size: int, device: torch.device
    ) -> None:
        self.cache, self.number, self.max_length, self.core = cache, number, cache.max_length, core
        self.state = core.cached_state(batch_size, cache.num_blocks, device)
        self.layout: BlockLayout | None = core.cached_layout(cache.max_length, device)
        if self.layout is None:
            shape = (core.num_kv_heads, cache.num_blocks)
            self.last_use = torch.full(shape, cache.num_blocks - 1, dtype=torch.int32)
        else:
            self.last_use = last_uses(self.layout, core.num_kv_heads)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend over the cache and new tokens, and cache these.

        Shapes are those of `core.attend`.
        """
        if self.cache.chunk is not None:
            return self.attend_chunk(query, key, value)
        self.append(key, value)
        return self._decode(query, self.cache.table[:, self.number], self.positions, self.layout)

    @property
    def chunk(self) -> Chunk | None:
        """Tokens that a prefill writes now; None while decoding."""
        return self.cache.chunk

    @property
    def positions(self) -> torch.Tensor:
        """Position of each sequence's new token: int32 [b] on the device.

        A finished sequence has -1.
        """
        return self.cache.positions

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Cache one new token of each sequence: [1, b, h_kv, d]."""
        pool, table = self.cache.pool, self.cache.table[:, self.number]
        append_token(key[0], value[0], pool.keys, pool.values, table, self.positions, backend=self.core.backend)

    def own_blocks(self) -> torch.Tensor:
        """Read the keys of each sequence's newest block.

        They are [b, h_kv, B, d], valid as far as they are written.
        """
        block = (self.positions.clamp(min=0) // self.cache.block_size).long()
        table = self.cache.table[:, self.number]
        pages = table.gather(2, block[:, None, None].expand(-1, table.shape[1], 1)).squeeze(2)
        return self.cache.pool.keys[pages.long()]

    def attend_listed(self, query: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Attend from each sequence's new token to listed blocks.

        Reads no other page.

        Args:
            query: [1, b, h, d].
            blocks: int [b, h_kv, slots], -1 where unused; the token's own block is in the last slot.
        """
        positions, size = self.positions, self.cache.block_size
        table = self.cache.table[:, self.number].gather(2, blocks.clamp(min=0).long()).masked_fill(blocks < 0, -1)
        # the listed pages in a row: all before the last are complete, so their order is free
        within = (blocks.shape[2] - 1) * size + positions % size
        return self._decode(query, table, torch.where(positions < 0, positions, within), None)

    def _decode(
        self, query: torch.Tensor, table: torch.Tensor, positions: torch.Tensor, layout: BlockLayout | None
    ) -> torch.Tensor:
        """Attend from each sequence's new token to the pages in `table`."""
        pool, core = self.cache.pool, self.core
        out, _ = block_sparse_decode(
            query[0],
            pool.keys,
            pool.values,
            table,
            positions,
            layout,
            softmax_scale=core.softmax_scale,
            backend=core.backend,
        )
        return out[None]

    def attend_each(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend as `attend` does, by `core.attend` on one sequence after the other.

        Serves every kind whose `attend` of later queries needs no earlier query. It is slow: it copies keys out of
        their pages, and the host waits.
        """
        cache, pool, table = self.cache, self.cache.pool, self.cache.table[:, self.number]
        if cache.chunk is not None:
            return self.attend_chunk(query, key, value)
        self.append(key, value)
        out = torch.zeros_like(query)
        for number in np.flatnonzero(~cache.finished).tolist():
            length, row = int(cache.lengths[number]) + 1, table[number : number + 1]
            keys, values = (read_tokens(pages, row, length).permute(2, 0, 1, 3) for pages in (pool.keys, pool.values))
            one = slice(number, number + 1)
            out[:, one] = self.core.attend(query[:, one], keys, values, query_offset=length - 1)
        return out

    def attend_chunk(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend from a prompt's chunk to earlier and new tokens.

        Caches the new tokens that later queries may read.
        """
        pool, table, chunk = self.cache.pool, self.cache.table[:, self.number], self.cache.chunk
        assert chunk is not None
        all_keys, all_values = key, value
        if chunk.start > 0:
            all_keys, all_values = (
                _after_earlier(pages, table, new, chunk) for pages, new in ((pool.keys, key), (pool.values, value))
            )
        out = self.core.attend(query, all_keys, all_values, query_offset=chunk.start)
        self.keep(chunk.lengths)
        write_tokens(pool.keys, table, key.permute(1, 2, 0, 3), chunk.start)
        write_tokens(pool.values, table, value.permute(1, 2, 0, 3), chunk.start)
        return out

    def keep(self, lengths: np.ndarray) -> None:
        """Keep exactly the pages that later queries need.

        These are queries after `lengths` [b] tokens.
        """
        block_size, pool = self.cache.block_size, self.cache.pool
        blocks = np.arange(self.cache.num_blocks)
        written = blocks < -(-lengths[:, None, None] // block_size)
        needed = written & (self.last_use.numpy() >= lengths[:, None, None] // block_size)
        pages = self.cache.pages[:, self.number]
        dropped, new = (pages >= 0) & ~needed, (pages < 0) & needed
        pool.give(pages[dropped])
        pages[dropped] = -1
        pages[new] = pool.take(int(new.sum()))
        self.cache.table[:, self.number] = to_device(pages, self.cache.table.device)


def _after_earlier(pages: torch.Tensor, table: torch.Tensor, new: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """Concatenate the cached tokens and a chunk's `new` tokens.

    `new` is [s, b, h, d].

    Returns:
        [chunk.stop, b, h, d]: a copy, with the pages' memory order.
    """
    tokens = read_tokens(pages, table, chunk.stop)
    tokens[:, :, chunk.start :] = new.permute(1, 2, 0, 3)
    return tokens.permute(2, 0, 1, 3)


def _letters(cores: list[CausalCoreAttention]) -> str:
    return "".join(core.layer_layout.kind.letter for core in cores)


@contextmanager
def kv_cache(gpt: GPTModel, batch_size: int, max_length: int) -> Iterator[KVCache]:
    """Attach a cache to every core attention of `gpt` inside this context.

    Args:
        gpt: model in eval mode, without sequence parallelism; each tensor parallel group holds all of it.
        max_length: tokens of the longest sequence, prompt and continuation.
    Raises:
        ValueError: the model can't decode with a cache, or a size is below 1.
        ConfigError: a layer's kind of attention doesn't support decoding.
    """
    config = gpt.config
    if config.sequence_parallel or config.context_parallel_size > 1 or config.pipeline_model_parallel_size > 1:
        raise ValueError(
            "decoding supports only tensor parallel models: load without sequence, pipeline and context parallelism"
        )
    if gpt.training:
        raise ValueError("the model is in training mode: call model.eval() before decoding")
    if min(batch_size, max_length) < 1:
        raise ValueError(f"sizes must be at least 1, got {batch_size=}, {max_length=}")
    cores = cores_of(gpt)
    if len(cores) != config.num_layers or any(core.kv is not None for core in cores):
        raise ValueError(f"{len(cores)} of {config.num_layers} layers support a cache, or one is already attached")
    if kinds := lacking([core.layer_layout for core in cores], Feature.DECODING):
        problem = f"{kinds[0].label} attention (letter {kinds[0].letter}) doesn't support decoding"
        raise ConfigError("layout.layers", _letters(cores), problem, "Decode with a model of other kinds of attention")
    weight = next(gpt.parameters())
    cache = KVCache(cores, batch_size, max_length, weight.dtype, weight.device)
    for core, layer in zip(cores, cache.layers, strict=True):
        core.kv = layer
    # transformer-engine's fused rotation supports only one position for all sequences
    fuses_rotation, config.apply_rope_fusion = config.apply_rope_fusion, False
    try:
        yield cache
    finally:
        config.apply_rope_fusion = fuses_rotation
        for core, layer in zip(cores, cache.layers, strict=True):
            core.kv = None
            del layer.cache, layer.core  # reference cycles: the pool's memory would wait for the garbage collector
