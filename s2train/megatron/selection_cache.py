"""What selection keeps of each block while decoding.

This is the feature of the block's keys, and the query that chooses for it. A new token then reads the features, a small
share of the keys, and the pages that its block's list names. All of it stays on the device, so that a CUDA graph can
capture it.
"""

import torch
from torch import Tensor

from s2train.attention.block_selection import FIRST_TOKEN
from s2train.attention.selection.lists import select
from s2train.attention.selection.scorer import precise
from s2train.megatron.core_attention import AttentionCache, CachedChunk
from s2train.megatron.selecting_core import SelectingCoreAttention


def whole_blocks(tokens: Tensor, size: int) -> Tensor:
    """View the complete blocks of `tokens`: [b, n, size, h, d].

    `tokens` is [s, b, h, d].
    """
    count = tokens.shape[0] // size
    return tokens[: count * size].unflatten(0, (count, size)).permute(2, 0, 1, 3, 4)


def pooled_keys(core: SelectingCoreAttention, key: Tensor) -> Tensor:
    """Pool the keys of complete blocks: [b, n, h_kv, f].

    `key` is [s, b, h_kv, d].
    """
    return core.kind.scorer.pool_keys(whole_blocks(key, core.layer_layout.block_size), core.weight)


def empty_state(
    core: SelectingCoreAttention, batch_size: int, num_blocks: int, device: torch.device
) -> dict[str, Tensor]:
    """Make the state of an empty cache.

    block_queries: [b, num_blocks + 1, h, d], the query that chooses for each query block; with `queries=previous_block`
    the sum so far of the block before, over the block size. features: [b, num_blocks, h_kv, f], as pooled. value_sums:
    [b, h_kv, d], of all tokens so far, where the output is mixed with their mean.
    """
    dim, heads = core.shape.head_dim, core.heads[1] - core.heads[0]
    dtype = precise(core.params_dtype)
    size = core.kind.scorer.feature_size(dim)
    state = {
        "block_queries": torch.zeros(batch_size, num_blocks + 1, heads, dim, dtype=dtype, device=device),
        "features": torch.zeros(batch_size, num_blocks, core.num_kv_heads, size, dtype=dtype, device=device),
    }
    if core.kind.settings.mix_mean:
        state["value_sums"] = torch.zeros(batch_size, core.num_kv_heads, dim, dtype=dtype, device=device)
    return state


def keep_chunk(
    core: SelectingCoreAttention,
    kv: AttentionCache,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunk: CachedChunk,
) -> None:
    """Keep the state of a prompt's chunk.

    The chunk begins with a block. Padding after a sequence's end is left out.
    """
    size = core.layer_layout.block_size
    first, count = chunk.start // size, core.layer_layout.num_blocks(query.shape[0])
    position = torch.arange(chunk.start, chunk.stop, device=query.device)
    written = position[:, None] < torch.from_numpy(chunk.lengths).to(query.device)  # [s, b]
    if core.kind.settings.mix_mean:
        sums = kv.state["value_sums"]
        earlier = sums.clone() if chunk.start else torch.zeros_like(sums)
        sums.copy_(earlier + value.to(sums.dtype).masked_fill(~written[..., None, None], 0).sum(0))
    features, block_queries = pooled_keys(core, key), kv.state["block_queries"]
    kv.state["features"][:, first : first + features.shape[1]] = features
    if core.kind.settings.queries == FIRST_TOKEN:
        block_queries[:, first : first + count] = query[::size].transpose(0, 1).to(block_queries.dtype)
        return
    sums = query.to(block_queries.dtype).masked_fill(~written[..., None, None], 0)
    sums = torch.nn.functional.pad(sums, (0, 0, 0, 0, 0, 0, 0, count * size - len(sums)))
    block_queries[:, first + 1 : first + 1 + count] = whole_blocks(sums, size).sum(2) / size


def keep_token(core: SelectingCoreAttention, kv: AttentionCache, query: Tensor) -> None:
    """Keep the state of one new token of each sequence.

    `query` is [1, b, h, d]; the token's key is in its page.
    """
    size = core.layer_layout.block_size
    position = kv.positions.clamp(min=0).long()
    block, sequence = position // size, torch.arange(len(position), device=query.device)
    # a block's feature counts once the block is complete; until then nobody selects it
    own = kv.own_blocks().transpose(1, 2)[:, None]  # [b, 1, B, h_kv, d]
    kv.state["features"][sequence, block] = core.kind.scorer.pool_keys(own, core.weight)[:, 0]
    block_queries = kv.state["block_queries"]
    new = query[0].to(block_queries.dtype)
    if core.kind.settings.queries == FIRST_TOKEN:
        begins = (position % size == 0)[:, None, None]
        block_queries[sequence, block] = torch.where(begins, new, block_queries[sequence, block])
    else:
        block_queries[sequence, block + 1] += new / size


def mean_with_token(kv: AttentionCache, value: Tensor) -> Tensor:
    """Add new tokens' values to each sequence's sum, and return the mean.

    `value` and the mean are [1, b, h_kv, d].
    """
    sums = kv.state["value_sums"]
    sums += value[0].to(sums.dtype)
    return (sums / (kv.positions.clamp(min=0) + 1)[:, None, None])[None]


def cached_lists(core: SelectingCoreAttention, kv: AttentionCache, rows: Tensor, num_blocks: int) -> Tensor:
    """Select blocks for consecutive query blocks: int32 [b, h_kv, r, slots].

    They are of the first `num_blocks` key blocks. `rows`, int64 [1 or b, 1, r], are the query blocks. Rows before them
    are scored too, as far as a row's scores depend on them.
    """
    scorer, budget = core.kind.scorer, core.kind.budget
    block_queries, features = kv.state["block_queries"], kv.state["features"][:, :num_blocks]
    earlier = torch.arange(-scorer.earlier_rows, 0, device=rows.device)
    around = torch.cat([rows[..., :1] + earlier, rows], -1)
    at = around.clamp(min=0)[:, 0, :, None, None].expand(len(block_queries), -1, *block_queries.shape[2:])
    candidates = budget.candidates(around, num_blocks)
    found = scorer.head_scores(block_queries.gather(1, at), features, candidates, core.weight)
    found = found[..., scorer.earlier_rows :, :]
    slots = budget.most_chosen(num_blocks)
    return select(found, rows, budget, slots, normalize=scorer.normalizes, backend=core.backend)


def cached_list(core: SelectingCoreAttention, kv: AttentionCache) -> Tensor:
    """Select the blocks that new tokens read: int32 [b, h_kv, slots]."""
    num_blocks = kv.state["features"].shape[1]
    rows = (kv.positions.clamp(min=0) // core.layer_layout.block_size).long()[:, None, None]
    return cached_lists(core, kv, rows, num_blocks)[:, :, 0]
