"""Block selection by definition, one query block and one KV head at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from s2train.attention.random_numbers import stateless_seed
from s2train.attention.selection.targets import sampled_positions
from s2train.megatron.core_attention import CausalCoreAttention

NONE = float("-inf")
Losses = dict[str, Tensor]


def _own(core: CausalCoreAttention) -> dict[str, Tensor]:
    return {weight.name: getattr(core, weight.name).detach().double() for weight in core.own_weights}


def candidates(core: CausalCoreAttention, block: int) -> list[int]:
    own = core.layer_layout.kind.settings
    return [c for c in range(block) if own.sinks <= c <= block - own.window]


def _block_query(core: CausalCoreAttention, query: Tensor, block: int) -> Tensor:
    """[h, d] of one sequence [s, h, d]."""
    size = core.layer_layout.block_size
    if core.layer_layout.kind.settings.queries == "first_token":
        return query[block * size]
    return query[(block - 1) * size : block * size].mean(0) if block else torch.zeros_like(query[0])


def _head_scores(
    core: CausalCoreAttention, weights: dict[str, Tensor], block_query: Tensor, keys: Tensor, g: int
) -> Tensor:
    """One number for each query head of KV head `g`, for one block of keys [B, d]: [group]."""
    name, dim = core.layer_layout.kind.settings.scorer, block_query.shape[-1]
    group = len(block_query) // core.num_kv_heads
    mine = block_query[g * group : (g + 1) * group]
    if name == "moba":
        return mine @ keys.mean(0) * dim**-0.5
    if name == "index":
        projected = torch.stack([mine[i] @ weights["index_query"][g * group + i] for i in range(group)])
        pooled = (keys @ weights["index_key"][g]).exp().mean(0).log()
        return projected @ pooled / projected.shape[-1] ** 0.5
    of = weights["kernel_features"][g]
    phi_keys = (keys * dim**-0.25 @ of - keys.square().sum(-1, keepdim=True) * dim**-0.5 / 2).exp().sum(0)
    return ((mine * dim**-0.25 @ of).exp() @ phi_keys).log()


def scores(core: CausalCoreAttention, weights: dict[str, Tensor], query: Tensor, key: Tensor) -> Tensor:
    """Scores [h_kv, n, n] of one sequence, -inf where a block is no candidate."""
    kind, size = core.layer_layout.kind, core.layer_layout.block_size
    count, group = core.layer_layout.num_blocks(len(query)), query.shape[1] // key.shape[1]
    per_head = query.new_full((query.shape[1], count, count), NONE)
    for block in range(count):
        block_query = _block_query(core, query, block)
        for c in candidates(core, block):
            keys = key[c * size : (c + 1) * size]
            for g in range(key.shape[1]):
                found = _head_scores(core, weights, block_query, keys[:, g], g)
                per_head[g * group : (g + 1) * group, block, c] = found
    grouped = per_head.unflatten(0, (key.shape[1], group))
    if kind.settings.scorer == "index":
        return grouped.exp().sum(1).log()
    shares = grouped.exp() / grouped.exp().sum(-1, keepdim=True).clamp_min(1e-30)
    shares = torch.where(grouped > NONE, shares, 0)
    if kind.settings.scorer == "moba":
        return shares.sum(1).log()
    logs = torch.where(shares > 0, shares.clamp_min(1e-30).log(), 0)
    maps = torch.cat([logs, shares], dim=1)  # [h_kv, 2 group, n, n]
    found = []
    for g, channels in enumerate(maps):
        span = slice(g * kind.settings.channels, (g + 1) * kind.settings.channels)
        hidden = F.gelu(F.conv2d(F.pad(channels[None], (2, 2, 2, 0)), weights["cnn_first"][span]))
        refined = F.conv2d(F.pad(hidden, (2, 2, 2, 0)), weights["cnn_second"][g : g + 1])[0, 0]
        found.append(weights["sharpness"][g] * shares[g].sum(0).clamp_min(1e-30).log() + refined)
    allowed = (grouped > NONE).any(1)
    return torch.where(allowed, torch.stack(found), NONE)


def read(core: CausalCoreAttention, query: Tensor, key: Tensor) -> Tensor:
    """Which keys each query reads: bool [b, h, s, s]."""
    own, size, length = core.layer_layout.kind.settings, core.layer_layout.block_size, len(query)
    count = core.layer_layout.num_blocks(length)
    group, batch = query.shape[2] // key.shape[2], query.shape[1]
    kept = torch.zeros(batch, query.shape[2], count, count, dtype=torch.bool)
    for sequence in range(batch):
        found = scores(core, _own(core), query[:, sequence].detach().double(), key[:, sequence].detach().double())
        for g in range(key.shape[2]):
            for block in range(count):
                best = sorted(candidates(core, block), key=lambda c: -float(found[g, block, c]))[: own.top_k]
                always = [c for c in range(block + 1) if c < own.sinks or c > block - own.window]
                kept[sequence, g * group : (g + 1) * group, block, best + always] = True
    position = torch.arange(length)
    causal = position[:, None] >= position
    return kept.repeat_interleave(size, 2).repeat_interleave(size, 3)[..., :length, :length] & causal


def finish(weights: dict[str, Tensor], query: Tensor, value: Tensor, out: Tensor) -> Tensor:
    """The output [s, b, h, d], mixed with the mean of values so far if a gate is there, one head at a time."""
    if "gate_query" not in weights:
        return out
    group, mixed = query.shape[2] // value.shape[2], []
    for head in range(query.shape[2]):
        gate = (query[:, :, head] @ weights["gate_query"][head] + weights["gate_bias"][head]).sigmoid()[..., None]
        means = torch.stack([value[: t + 1, :, head // group].mean(0) for t in range(len(value))])
        mixed.append(gate * out[:, :, head] + (1 - gate) * means)
    return torch.stack(mixed, 2)


def losses(core: CausalCoreAttention, weights: dict[str, Tensor], query: Tensor, key: Tensor, value: Tensor) -> Losses:
    """The scorer's losses at the sampled queries, against dense attention."""
    kind, size = core.layer_layout.kind, core.layer_layout.block_size
    if kind.settings.scorer == "moba":
        return {}
    query, key = query.detach(), key.detach()
    group = query.shape[2] // key.shape[2]
    seed = stateless_seed(core.seed, core.step, core.layer_number, "rows")
    rows = sampled_positions(len(query), kind.settings.sampled_rows, seed, torch.device("cpu")).tolist()
    total = {"kl": query.new_zeros(()), "mse": query.new_zeros(())}
    for sequence in range(query.shape[1]):
        of_blocks = scores(core, weights, query[:, sequence], key[:, sequence])
        for row in rows:
            chosen = candidates(core, row // size)
            if not chosen:
                continue
            for g in range(key.shape[2]):
                heads = query[row, sequence, g * group : (g + 1) * group]
                dense = (heads @ key[: row + 1, sequence, g].T * core.softmax_scale).softmax(-1).mean(0)
                mass = torch.stack([dense[c * size : (c + 1) * size].sum() for c in chosen])
                estimate = of_blocks[g, row // size, chosen].softmax(-1)
                weight = 1 / (len(rows) * query.shape[1] * key.shape[2])
                share = mass / mass.sum()
                total["kl"] = total["kl"] + weight * (mass * (share / estimate).log()).sum()
                total["mse"] = total["mse"] + weight * (estimate * mass.sum() - mass).square().sum()
    return {name: total[name] for name in kind.scorer.losses}
