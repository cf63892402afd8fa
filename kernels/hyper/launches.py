"""Launch the kernels of HyperAttention in order, phase by phase."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import spec as specs
from ..backward import _PREPROCESS_ROWS, s2_attention_bwd_kernel_preprocess
from ..configs import Config, padded, shared_limit
from ..layout import BlockLayout
from ..spec import AttentionSpec
from ..tiles import LOG2_E, strides
from ..triton_backend import run_backward, run_forward
from .backward import (
    s2_hyper_bucket_dkdv_kernel,
    s2_hyper_bucket_dq_kernel,
    s2_hyper_sample_dkdv_kernel,
    s2_hyper_sample_dq_kernel,
)
from .configs import Kernel, config_for
from .forward import s2_hyper_bucket_fwd_kernel, s2_hyper_hash_kernel, s2_hyper_sample_fwd_kernel
from .hashing import projections
from .plan import Plan, make_plan, tiles
from .ranges import Ranges
from .settings import HyperSettings

# Readers, of all heads of a group, that one program of the samples' dk and dv visits: few enough to fill the device,
# enough that the sums of its chunks are little traffic.
_CHUNK = 8192
_HASH_ROWS = 128


@dataclass(frozen=True)
class Call:
    """What stays the same over a call's launches."""

    settings: HyperSettings
    spec: AttentionSpec
    length: int
    heads: int
    kv_heads: int
    dim: int
    v_dim: int

    @property
    def local(self) -> bool:
        """Are there exact keys for every query?"""
        return self.spec.causal or bool(self.settings.window or self.settings.sinks) or self.short

    @property
    def short(self) -> bool:
        """Is the whole sequence exact?"""
        return self.length <= self.settings.shortest

    @property
    def window_blocks(self) -> int:
        """Exact blocks on each side of a query's block.

        -1 if its own block isn't exact either.
        """
        blocks = self.settings.window // self.settings.block
        return blocks if blocks or self.spec.causal else -1

    def dims(self) -> dict[str, Any]:
        dims = {"DIM": self.dim, "V_DIM": self.v_dim, "PADDED_DIM": padded(self.dim)}
        return dims | {"PADDED_V_DIM": padded(self.v_dim), "BLOCK": self.settings.block, "CAUSAL": self.spec.causal}

    def config(self, kernel: Kernel, q: Tensor) -> Config:
        most = self.settings.bucket if kernel.startswith("bucket") else self.settings.shortest
        return config_for(kernel, most, self.dim, self.v_dim, q.dtype, shared_limit(q.device))

    def layout(self, device: torch.device) -> BlockLayout:
        """Return the block layout of exact keys."""
        blocks = -(-self.length // self.settings.block)
        return local_layout(self.settings, blocks, self.short, self.heads, self.spec.causal, device)


def call_of(q: Tensor, k: Tensor, v: Tensor, settings: HyperSettings, spec: AttentionSpec) -> Call:
    """Describe a call with views q, k, v [b, h, n, d]."""
    return Call(settings, spec, q.shape[2], q.shape[1], k.shape[1], q.shape[3], v.shape[3])


@lru_cache(maxsize=64)  # within documents a step has many lengths
def local_layout(
    settings: HyperSettings, blocks: int, short: bool, heads: int, causal: bool, device: torch.device
) -> BlockLayout:
    """Return the layout of what is read exactly: intervals, window, sinks.

    It is built on the host: documents have new lengths in every step, and on a GPU building it and its schedules would
    wait each time.
    """
    block = settings.block
    interval = settings.shortest // block if causal or short else 0
    window, sinks = settings.window // block, settings.sinks // block

    def keeps(query: Tensor, key: Tensor) -> Tensor:
        kept = (key < sinks) | torch.zeros_like(query * key, dtype=torch.bool)
        if causal or window:
            kept = kept | ((query - key).abs() <= window)
        if interval:
            kept = kept | (query // interval == key // interval)
        return kept & (key <= query) if causal else kept

    return BlockLayout.from_rule([keeps], [0] * heads, block, blocks, blocks, device="cpu").copied_to(device)


def hash_rows(x: Tensor, directions: Tensor) -> Tensor:
    """Hash rows of x, int32 [b, h, n].

    x is [b, h, n, d], directions are [H_kv, d, bits].
    """
    batch, heads, length, dim = x.shape
    ranks = torch.empty((batch, heads, length), dtype=torch.int32, device=x.device)
    bits = directions.shape[-1]
    num_tiles = -(-length // _HASH_ROWS)
    with torch.cuda.device_of(x):
        s2_hyper_hash_kernel[(batch * heads * num_tiles,)](
            x, directions, ranks, *strides(x), num_tiles, heads, heads // len(directions), length,
            DIM=dim, PADDED_DIM=padded(dim), BITS=bits, PADDED_BITS=padded(bits), ROWS=_HASH_ROWS, num_warps=4,
        )  # fmt: skip
    return ranks


def hash_all(q: Tensor, k: Tensor, seeds: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Hash queries and keys as `hashing.hash_ranks`, in one pass over each."""
    directions = projections(seeds, q.shape[-1], number).to(q.dtype)
    return hash_rows(q, directions), hash_rows(k, directions)


def plan_of(q: Tensor, k: Tensor, call: Call, projection_seeds: Tensor, sample_seeds: Tensor) -> Plan:
    """Hash, sort and sample; there is at least one interval."""
    ranks = hash_all(q, k, projection_seeds, call.settings.projections)
    return make_plan(*ranks, call.settings, sample_seeds, call.spec.causal, kernels=True)


def sampled(x: Tensor, plan: Plan) -> Tensor:
    """Gather sampled rows of k or v, [all samples, d]."""
    kv_heads = x.shape[1]
    parts = []
    for r, positions in _by_level(plan):
        row = torch.arange(plan.rows, device=x.device)[:, None]
        parts.append(x[row // kv_heads, row % kv_heads, positions.view(plan.rows, -1).long()].flatten(0, 1))
        assert parts[-1].shape[0] == plan.rows * r.level.count * r.samples
    return torch.cat(parts)


def _by_level(plan: Plan) -> list[tuple[Ranges, Tensor]]:
    """Return each level's range with the positions of its samples, flat."""
    sizes = [plan.rows * r.level.count * r.samples for r in plan.ranges]
    return list(zip(plan.ranges, plan.sample_keys.split(sizes), strict=True))


def local_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Attend to exact keys with the block-sparse op."""
    return run_forward(q, k, v, call.layout(q.device), call.spec)


def sample_forward(
    q: Tensor, k_s: Tensor, v_s: Tensor, local: tuple[Tensor, Tensor] | None, plan: Plan, call: Call
) -> tuple[Tensor, Tensor]:
    """Add samples to the exact keys' output and log-sum-exp, in float32."""
    batch, heads, length, _ = q.shape
    out = specs.empty((batch, heads, length, call.v_dim), torch.float32, q.device)
    lse = specs.empty((batch, heads, length), torch.float32, q.device)
    config = call.config("sample forward", q)
    num_tiles = -(-length // config.rows)
    local_out, local_lse = (out, lse) if local is None else local
    with torch.cuda.device_of(q):
        s2_hyper_sample_fwd_kernel[(batch * heads * num_tiles,)](
            q, k_s, v_s, local_out, local_lse, out, lse,
            plan.own_buckets, plan.sample_keys, plan.sample_buckets, plan.sample_weights,
            *strides(q), *strides(local_out), call.spec.softmax_scale * LOG2_E, num_tiles, *_sample_numbers(plan, call),
            **call.dims(), ROWS=config.rows, STEPS=config.steps, SHORTEST=call.settings.shortest,
            LOCAL=local is not None, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out, lse


def bucket_forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, call: Call) -> None:
    """Add each query's buckets to `out` and `lse`, level by level."""
    config = call.config("bucket forward", q)
    table, ranges = tiles(plan, config.rows)
    with torch.cuda.device_of(q):
        for r, (first, end) in zip(plan.ranges, ranges, strict=True):
            s2_hyper_bucket_fwd_kernel[(end - first,)](
                q, k, v, out, lse, table, plan.queries, plan.keys[r.key_base :],
                *strides(q), *strides(k), *strides(v), call.spec.softmax_scale * LOG2_E,
                first, r.bucket_base, r.buckets, r.level.count, r.level.size,
                *_numbers(plan, call), **call.dims(), ROWS=config.rows, STEPS=config.steps,
                BUCKET=call.settings.bucket, num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip


def delta_of(out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
    """Compute rowsum(out * dout) - dlse, float32 [b, H, n]."""
    batch, heads, length, v_dim = out.shape
    delta = specs.empty((batch, heads, length), torch.float32, out.device)
    num_tiles = -(-length // _PREPROCESS_ROWS)
    with torch.cuda.device_of(out):
        s2_attention_bwd_kernel_preprocess[(batch * heads * num_tiles,)](
            out, dout, lse, dlse, delta, *strides(out), *strides(dout), num_tiles, heads, length,
            V_DIM=v_dim, PADDED_V_DIM=padded(v_dim), ROWS=_PREPROCESS_ROWS, HAS_DLSE=dlse is not None,
        )  # fmt: skip
    return delta


def local_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the exact keys' part of the gradients.

    out and lse are those of all parts.
    """
    return run_backward(q, k, v, out, lse, dout, dlse, call.layout(q.device), call.spec)


@dataclass(frozen=True)
class Rows:
    """What all parts of the backward read of the queries."""

    q: Tensor
    dout: Tensor
    lse: Tensor
    delta: Tensor


def sample_dq(rows: Rows, k_s: Tensor, v_s: Tensor, local: Tensor | None, plan: Plan, call: Call) -> Tensor:
    """Return dq of exact keys and samples, float32 [b, H, n, d]."""
    q = rows.q
    batch, heads, length, dim = q.shape
    dq = specs.empty((batch, heads, length, dim), torch.float32, q.device)
    config = call.config("sample dq", q)
    num_tiles = -(-length // config.rows)
    local_dq = dq if local is None else local
    with torch.cuda.device_of(q):
        s2_hyper_sample_dq_kernel[(batch * heads * num_tiles,)](
            q, k_s, v_s, rows.dout, rows.lse, rows.delta, local_dq, dq,
            plan.own_buckets, plan.sample_keys, plan.sample_buckets, plan.sample_weights,
            *strides(q), *strides(rows.dout), *strides(local_dq),
            call.spec.softmax_scale, call.spec.softmax_scale * LOG2_E, num_tiles, *_sample_numbers(plan, call),
            **call.dims(), ROWS=config.rows, STEPS=config.steps, SHORTEST=call.settings.shortest,
            LOCAL=local is not None, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return dq


def sample_dkdv(rows: Rows, k_s: Tensor, v_s: Tensor, dk: Tensor, dv: Tensor, plan: Plan, call: Call) -> None:
    """Add the samples' part to dk and dv, in float32."""
    q, length = rows.q, plan.length
    config = call.config("sample dkdv", q)
    for r, positions in _by_level(plan):
        level = r.level
        chunk = min(level.size, max(call.settings.shortest, _CHUNK // plan.group))
        chunks = -(-level.size // chunk)
        intervals = plan.rows * level.count
        sums = [specs.empty((intervals, chunks, r.samples, x.shape[-1]), torch.float32, q.device) for x in (k_s, v_s)]
        with torch.cuda.device_of(q):
            s2_hyper_sample_dkdv_kernel[(intervals * chunks * -(-r.samples // config.rows),)](
                q, k_s, v_s, rows.dout, rows.lse, rows.delta, *sums,
                plan.own_buckets, plan.sample_keys, plan.sample_buckets, plan.sample_weights[r.weight_base :],
                *strides(q), *strides(rows.dout), call.spec.softmax_scale, call.spec.softmax_scale * LOG2_E,
                chunks, chunk, r.query_base, r.sample_base, r.samples, level.count, level.size, level.period,
                level.shift, *_numbers(plan, call), **call.dims(), ROWS=config.rows, STEPS=config.steps,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
        row = torch.arange(plan.rows, device=q.device)[:, None] * length
        at = (positions.view(plan.rows, -1) + row).flatten()
        for x, part in zip((dk, dv), sums, strict=True):
            # a key is drawn once in a level: each row has one summand
            x.view(-1, x.shape[-1]).index_add_(0, at, part.sum(1).flatten(0, 1))


def bucket_dq(rows: Rows, k: Tensor, v: Tensor, dq: Tensor, plan: Plan, call: Call) -> None:
    """Add the buckets' part to dq, level by level."""
    q = rows.q
    config = call.config("bucket dq", q)
    table, ranges = tiles(plan, config.rows)
    with torch.cuda.device_of(q):
        for r, (first, end) in zip(plan.ranges, ranges, strict=True):
            s2_hyper_bucket_dq_kernel[(end - first,)](
                q, k, v, rows.dout, rows.lse, rows.delta, dq, table, plan.queries, plan.keys[r.key_base :],
                *strides(q), *strides(k), *strides(v), *strides(rows.dout),
                call.spec.softmax_scale, call.spec.softmax_scale * LOG2_E,
                first, r.bucket_base, r.buckets, r.level.count, r.level.size,
                *_numbers(plan, call), **call.dims(), ROWS=config.rows, STEPS=config.steps,
                BUCKET=call.settings.bucket, num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip


def bucket_dkdv(rows: Rows, k: Tensor, v: Tensor, dk: Tensor, dv: Tensor, plan: Plan, call: Call) -> None:
    """Add the buckets' part to dk and dv, level by level."""
    q = rows.q
    config = call.config("bucket dkdv", q)
    with torch.cuda.device_of(q):
        for r in plan.ranges:
            buckets = plan.rows * r.level.count * r.buckets
            s2_hyper_bucket_dkdv_kernel[(buckets * (call.settings.bucket // config.rows),)](
                q, k, v, rows.dout, rows.lse, rows.delta, dk, dv, plan.bucket_starts, plan.queries,
                plan.keys[r.key_base :], *strides(q), *strides(k), *strides(v), *strides(rows.dout),
                call.spec.softmax_scale, call.spec.softmax_scale * LOG2_E,
                r.bucket_base, r.buckets, r.level.count, r.level.size, *_numbers(plan, call), **call.dims(),
                ROWS=config.rows, STEPS=config.steps, BUCKET=call.settings.bucket,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip


def _numbers(plan: Plan, call: Call) -> tuple[int, ...]:
    settings = call.settings
    return plan.group, call.kv_heads, plan.length, settings.sinks, call.window_blocks


def _sample_numbers(plan: Plan, call: Call) -> tuple[int, ...]:
    group, kv_heads, length, sinks, window = _numbers(plan, call)
    return len(plan.ranges), plan.rows, group, kv_heads, length, call.settings.samples, sinks, window
