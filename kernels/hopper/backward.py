"""Gluon backward for Hopper in one pass, specialised by warps.

A program has two consumer warpgroups, a producer warp, and one warp per warpgroup that reduces dq. It owns two 64-key
tiles of one KV head, one per consumer warpgroup, and visits the tiles of 64 or 128 queries that keep either
(`BackwardSchedule`). The key tiles are the halves of a block of 128 keys, or two blocks of 64 that similar queries
keep. Scores are [keys, queries], so that P^T and dS^T feed dv and dk from registers:
    S^T = K Q^T,  dP^T = V dO^T,  P^T = exp2(S^T - lse),  dS^T = P^T (dP^T - delta),
    dv += P^T dO,  dk += dS^T Q;   dS^T goes to shared memory, and each warpgroup computes half of the head dimensions
    of dq = dS K over the keys of both, which a separate warp adds to float32 memory (TMA reduce-add).
What a consumer does with a query tile is in `backward_steps`.
dq is accumulated in the order of the warpgroup's registers, which `s2_attention_bwd_kernel_hopper_finish` reverts.
Programs add to it in an order that differs between runs, and so do dq's last bits.
"""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..fp_fusion import with_fp_fusion
from ..launch import launch
from ..part_sums import launch_of_sums, new_parts, s2_attention_bwd_kernel_add_parts
from ..spec import AttentionSpec, empty, empty_bhsd
from ..tiles import LOG2_E, strides
from ..topk_layout import Layout
from .backward_config import HopperBackwardConfig, check_config, chosen_config
from .backward_rows import s2_attention_bwd_kernel_hopper_finish, s2_attention_bwd_kernel_hopper_prepare
from .backward_schedule import BackwardSchedule
from .backward_steps import TILE, idle_step, process_halves, process_step
from .call_schedule import schedule_of_call
from .descriptors import descriptor
from .releases import async_load, async_store, reduce_add, reinterpret, thread_barrier
from .repeated import Launched, RepeatedBackward, can_repeat
from .shared_tiles import SharedTiles, launch_of_tiles, s2_attention_bwd_kernel_hopper_add_tiles
from .support import fits_descriptor

# A step has 32 bits: whether each warpgroup's keys need a mask (2 bits), query tile, head within the group.
ACTIVE_BITS = gl.constexpr(2)
QUERY_BITS = gl.constexpr(20)
# ints per pair: KV head, both key tiles, first step's index, masked steps, steps, first step, first sequence
META = gl.constexpr(8)
# the first six of these, then: steps to skip after the masked ones, document's first tile, first row, length
PACKED_META = gl.constexpr(10)


@gluon.jit
def _work(meta_ptr, batch_size, PACKED: gl.constexpr):
    w = gl.program_id(0) // batch_size
    b = gl.program_id(0) % batch_size
    at = meta_ptr + w * (PACKED_META if PACKED else META)
    if not PACKED:
        b += gl.load(at + 7)
    return b, gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3), gl.load(at + 4), gl.load(at + 5)


@gluon.jit
def _first_step(meta_ptr, steps_ptr, first, batch_size, PACKED: gl.constexpr):
    """Load step 0, which the pair's row of `meta` repeats.

    Thus this load does not wait for another one.
    """
    if PACKED:
        return gl.load(steps_ptr + first)
    return gl.load(meta_ptr + gl.program_id(0) // batch_size * META + 6)


@gluon.jit
def _document(meta_ptr, first_tile, offset, s_k, PACKED: gl.constexpr):
    """Locate a document.

    Returns number of the first query tile, position of row 0, first row of the keys, number of keys. Query tiles are
    numbered through all documents.
    """
    if PACKED:
        at = meta_ptr + gl.program_id(0) * PACKED_META  # batch 1
        start = gl.load(at + 8)
        return 0 - gl.load(at + 7), 0 - start, start, gl.load(at + 9)
    return first_tile, offset, 0, s_k


@gluon.jit
def _load_step(steps_ptr, meta_ptr, first, t, PACKED: gl.constexpr):
    """Load step t.

    A document skips the first unmasked steps, because their queries lie after its end.
    """
    at = steps_ptr + first + t
    if PACKED:
        work = meta_ptr + gl.program_id(0) * PACKED_META
        at += gl.where(t >= gl.load(work + 4), gl.load(work + 6), 0)
    return gl.load(at)


@gluon.jit
def _unpack(entry, kv, group):
    """Return head and query tile of a step."""
    return kv * group + (entry >> (ACTIVE_BITS + QUERY_BITS)), (entry >> ACTIVE_BITS) & ((1 << QUERY_BITS) - 1)


@gluon.jit
def _producer(
    x_desc, stat_desc, k_desc, v_desc, x_s, stat_s, k_s, v_s, k_full, x_full, free,
    meta_ptr, steps_ptr, batch_size, num_heads, group, first_tile, num_tiles, offset,
    STAGES: gl.constexpr, EXTRA: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Load q, log-sum-exps, k and v if EXTRA, else dout and deltas."""
    ROWS: gl.constexpr = x_desc.block_shape[2]
    T4: gl.constexpr = k_desc.block_shape
    dt: gl.constexpr = x_desc.dtype
    b, kv, ka, kb, first, _, num_steps = _work(meta_ptr, batch_size, PACKED)
    first_tile, offset, start, _ = _document(meta_ptr, first_tile, offset, 0, PACKED)
    if EXTRA:
        mbarrier.expect(k_full, 4 * k_desc.block_type.nbytes)
        for c in gl.static_range(2):
            key = (ka if c == 0 else kb) * TILE + start
            async_load(k_desc, [b, kv, key, 0], k_full, reinterpret(k_s.index(c), dt, T4, k_desc.layout))
            async_load(v_desc, [b, kv, key, 0], k_full, reinterpret(v_s.index(c), dt, T4, v_desc.layout))
    entry = _first_step(meta_ptr, steps_ptr, first, batch_size, PACKED)
    for t in range(0, num_steps):
        following = _load_step(steps_ptr, meta_ptr, first, gl.minimum(t + 1, num_steps - 1), PACKED)
        head, tile = _unpack(entry, kv, group)
        st = t % STAGES
        mbarrier.wait(free.index(st), ((t // STAGES) & 1) ^ 1)
        mbarrier.expect(x_full.index(st), x_desc.block_type.nbytes + stat_desc.block_type.nbytes)
        async_load(
            x_desc, [b, head, tile * ROWS - offset, 0], x_full.index(st),
            reinterpret(x_s.index(st), dt, x_desc.block_shape, x_desc.layout),
        )  # fmt: skip
        at = ((b * num_heads + head) * num_tiles + tile * (ROWS // TILE) - first_tile) * TILE
        async_load(stat_desc, [at], x_full.index(st), stat_s.index(st))
        entry = following


@gluon.jit
def _reducer(
    acc_desc, dq_s, dq_full, dq_free, free, meta_ptr, steps_ptr, batch_size, num_heads, group, first_tile, num_tiles,
    C: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr, QT: gl.constexpr,
):  # fmt: skip
    """Add the half of dq that a warpgroup leaves in shared memory.

    Also free the tiles of the previous step, where a step has 64 queries. Larger tiles have two stages, too few for
    loads that start so late, so that their consumers free them.
    """
    ROWS: gl.constexpr = acc_desc.block_shape[0]
    b, kv, _, _, first, _, num_steps = _work(meta_ptr, batch_size, PACKED)
    first_tile, _, _, _ = _document(meta_ptr, first_tile, 0, 0, PACKED)
    entry = _first_step(meta_ptr, steps_ptr, first, batch_size, PACKED)
    for n in range(0, num_steps):
        following = _load_step(steps_ptr, meta_ptr, first, gl.minimum(n + 1, num_steps - 1), PACKED)
        head, tile = _unpack(entry, kv, group)
        if QT == TILE:
            row = (((b * num_heads + head) * num_tiles + tile - first_tile) * 2 + C) * ROWS
        else:
            row = ((b * num_heads + head) * num_tiles + tile * 2 - first_tile + C) * ROWS
        mbarrier.wait(dq_full.index(C), n & 1)
        if QT == TILE:
            # dq(n) has been written, so its warpgroup has finished step n-1 and no longer needs its tiles
            mbarrier.arrive(free.index((n - 1) % STAGES), count=1, pred=n >= 1)
        reduce_add(acc_desc, [row, 0], dq_s.index(C))
        tma.store_wait(pendings=0)
        mbarrier.arrive(dq_free.index(C), count=1)
        entry = following


@gluon.jit
def _consumer(
    dk_desc, dv_desc, k_s, v_s, q_s, dout_s, lse_s, delta_s, ds_s, dq_s,
    k_full, q_full, dout_full, free, ds_full, dq_free, dq_full, done,
    meta_ptr, steps_ptr, dk_ptr, dv_ptr, slots_ptr, parts_ptr, head_stride, row_stride, batch_size, scale, scale_log2,
    s_k,
    C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, HL: gl.constexpr,
    PACKED: gl.constexpr, CUT: gl.constexpr, QT: gl.constexpr,
):  # fmt: skip
    process: gl.constexpr = process_step if QT == TILE else process_halves
    DQ: gl.constexpr = D * QT // (2 * TILE)  # columns of a warpgroup's half of dq
    SL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16])
    OL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    QL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DQ, 16])
    PL: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OL, k_width=2)
    dt: gl.constexpr = q_s.dtype
    T4: gl.constexpr = dk_desc.block_shape
    b, kv, ka, kb, first, num_masked, num_steps = _work(meta_ptr, batch_size, PACKED)
    _, _, _, num_keys = _document(meta_ptr, 0, 0, s_k, PACKED)
    key_tile = ka if C == 0 else kb
    key = key_tile * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, SL))
    key = gl.where(key < num_keys, key, 2147483647)
    query = gl.arange(0, TILE, layout=gl.SliceLayout(0, SL))
    zs = gl.zeros([TILE, TILE], gl.float32, SL)
    zq = gl.zeros([TILE, DQ], gl.float32, QL)
    dk = gl.zeros([TILE, D], gl.float32, OL)
    dv = gl.zeros([TILE, D], gl.float32, OL)
    entry = _first_step(meta_ptr, steps_ptr, first, batch_size, PACKED)
    mbarrier.wait(k_full, 0)
    own = (k_s, v_s)
    if D == TILE:
        own = (k_s.index(C).load(PL), v_s.index(C).load(PL))
    for t in range(0, num_masked):
        tile = (entry >> ACTIVE_BITS) & ((1 << QUERY_BITS) - 1)
        column = query + tile * QT if CAUSAL else query * 0 + (2147483646 - (QT - TILE))
        is_kept = ((entry >> C) & 1) != 0
        entry = gl.load(steps_ptr + first + gl.minimum(t + 1, num_steps - 1))
        if is_kept:
            dk, dv = process(
                q_s, dout_s, lse_s, delta_s, k_s, own, ds_s, dq_s, q_full, dout_full, free, ds_full, dq_free, dq_full,
                t, dk, dv, scale_log2, zs, zq, key, column,
                C, STAGES, True, PL, HL,
            )  # fmt: skip
        else:
            idle_step(k_s, ds_s, dq_s, ds_full, dq_free, dq_full, t, zs, zq, C, HL)
            if QT != TILE:
                mbarrier.arrive(free.index(t % STAGES), count=1)
    for t in range(num_masked, num_steps):
        dk, dv = process(
            q_s, dout_s, lse_s, delta_s, k_s, own, ds_s, dq_s, q_full, dout_full, free, ds_full, dq_free, dq_full,
            t, dk, dv, scale_log2, zs, zq, key, query,
            C, STAGES, False, PL, HL,
        )  # fmt: skip
    mbarrier.arrive(done.index(C), count=1)
    _, _, start, num_keys = _document(meta_ptr, 0, 0, s_k, PACKED)  # computed again, to save registers
    row = key_tile * TILE + start
    slot = -1
    if CUT:
        slot = gl.load(slots_ptr + gl.program_id(0) // batch_size)
    if CUT and slot >= 0:
        number = slot.to(gl.int64)  # type: ignore[attr-defined]
        place = (number * batch_size + gl.program_id(0) % batch_size) * 2 + C
        part = parts_ptr + place * (2 * TILE * D)
        _store_part(dk, part, D, 0, TILE, D)
        _store_part(dv, part + TILE * D, D, 0, TILE, D)
    elif PACKED and (key_tile + 1) * TILE > num_keys:  # TMA would overwrite the first rows of the next document
        head = kv.to(gl.int64) * head_stride
        _store_part(dv, dv_ptr + head, row_stride, row, start + num_keys, D)
        _store_part(dk * scale, dk_ptr + head, row_stride, row, start + num_keys, D)
    else:
        v_s.index(C).store(dv.to(dt))  # only this warpgroup read its half of v
        fence_async_shared()
        thread_barrier()
        async_store(dv_desc, [b, kv, row, 0], reinterpret(v_s.index(C), dt, T4, dv_desc.layout))
        mbarrier.wait(done.index(1 - C), 0)  # the other warpgroup has read this half of k for its last dq
        k_s.index(C).store((dk * scale).to(dt))
        fence_async_shared()
        thread_barrier()
        async_store(dk_desc, [b, kv, row, 0], reinterpret(k_s.index(C), dt, T4, dk_desc.layout))
        tma.store_wait(pendings=0)


@gluon.jit
def _store_part(x, base, stride, row, end, D: gl.constexpr):
    """Store x at rows [row, row + 64), but only before `end`."""
    L: gl.constexpr = x.type.layout
    rows = row + gl.arange(0, TILE, layout=gl.SliceLayout(1, L))
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, L))
    at = base + gl.expand_dims(rows.to(gl.int64) * stride, 1) + gl.expand_dims(dims, 0)
    gl.store(at, x.to(base.dtype.element_ty), mask=gl.expand_dims(rows < end, 1) & gl.expand_dims(dims < D, 0))


@with_fp_fusion
@gluon.jit(
    do_not_specialize=[
        "head_stride", "row_stride",
        "batch_size", "num_heads", "group", "first_tile", "num_tiles", "offset", "s_k",
    ]
)  # fmt: skip
def s2_attention_bwd_kernel_hopper(
    q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, acc_desc, dk_desc, dv_desc, meta_ptr, steps_ptr,
    dk_ptr, dv_ptr, slots_ptr, parts_ptr, head_stride, row_stride,
    scale, scale_log2, batch_size, num_heads, group, first_tile, num_tiles, offset, s_k,
    D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, PACKED: gl.constexpr, CUT: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, OTHER_REGS: gl.constexpr, QT: gl.constexpr,
):  # fmt: skip
    """Allocate shared memory and barriers, and start the six roles.

    A step has QT queries: 64, or, for head dimension 64, 128.
    """
    BL: gl.constexpr = mbarrier.MBarrierLayout()
    dt: gl.constexpr = q_desc.dtype
    ML: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    # layout of k and, where dq's halves have 64 queries, its halves: panels half as wide as the head dimension, so that
    # each half is a separate region
    HL: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=D * QT // TILE, element_bitwidth=16, rank=2)
    k_s = gl.allocate_shared_memory(dt, [2, TILE, D], HL)
    v_s = gl.allocate_shared_memory(dt, [2, TILE, D], ML)
    q_s = gl.allocate_shared_memory(dt, [STAGES, QT, D], ML)
    dout_s = gl.allocate_shared_memory(dt, [STAGES, QT, D], ML)
    ds_s = gl.allocate_shared_memory(dt, [4, TILE, QT], ML)
    dq_s = gl.allocate_shared_memory(gl.float32, [2, D * QT // TILE, 32], acc_desc.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, QT], lse_desc.layout)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, QT], delta_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [1], BL)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    dout_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    ds_full = gl.allocate_shared_memory(gl.int64, [4, 1], BL)
    dq_free = gl.allocate_shared_memory(gl.int64, [2, 1], BL)
    dq_full = gl.allocate_shared_memory(gl.int64, [2, 1], BL)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    done = gl.allocate_shared_memory(gl.int64, [2, 1], BL)
    mbarrier.init(k_full, count=1)
    for c in gl.static_range(STAGES):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(dout_full.index(c), count=1)
        mbarrier.init(free.index(c), count=2)
    for c in gl.static_range(4):
        mbarrier.init(ds_full.index(c), count=1)
    for c in gl.static_range(2):
        mbarrier.init(dq_free.index(c), count=1)
        mbarrier.init(done.index(c), count=1)
        mbarrier.init(dq_full.index(c), count=1)
    fence_async_shared()
    thread_barrier()
    gl.warp_specialize(
        [
            (_consumer, (dk_desc, dv_desc, k_s, v_s, q_s, dout_s, lse_s, delta_s, ds_s, dq_s,
                         k_full, q_full, dout_full, free, ds_full, dq_free, dq_full, done,
                         meta_ptr, steps_ptr, dk_ptr, dv_ptr, slots_ptr, parts_ptr, head_stride, row_stride,
                         batch_size, scale, scale_log2, s_k, 0, D, STAGES, CAUSAL, HL, PACKED, CUT, QT)),
            (_consumer, (dk_desc, dv_desc, k_s, v_s, q_s, dout_s, lse_s, delta_s, ds_s, dq_s,
                         k_full, q_full, dout_full, free, ds_full, dq_free, dq_full, done,
                         meta_ptr, steps_ptr, dk_ptr, dv_ptr, slots_ptr, parts_ptr, head_stride, row_stride,
                         batch_size, scale, scale_log2, s_k, 1, D, STAGES, CAUSAL, HL, PACKED, CUT, QT)),
            (_producer, (q_desc, lse_desc, k_desc, v_desc, q_s, lse_s, k_s, v_s, k_full, q_full, free,
                         meta_ptr, steps_ptr, batch_size, num_heads, group, first_tile, num_tiles, offset, STAGES, 1,
                         PACKED)),
            (_producer, (dout_desc, delta_desc, k_desc, v_desc, dout_s, delta_s, k_s, v_s, k_full, dout_full, free,
                         meta_ptr, steps_ptr, batch_size, num_heads, group, first_tile, num_tiles, offset, STAGES, 0,
                         PACKED)),
            (_reducer, (acc_desc, dq_s, dq_full, dq_free, free, meta_ptr, steps_ptr, batch_size, num_heads, group,
                        first_tile, num_tiles, 0, STAGES, PACKED, QT)),
            (_reducer, (acc_desc, dq_s, dq_full, dq_free, free, meta_ptr, steps_ptr, batch_size, num_heads, group,
                        first_tile, num_tiles, 1, STAGES, PACKED, QT)),
        ],
        [4, 1, 1, 1, 1], [CONSUMER_REGS, OTHER_REGS, OTHER_REGS, OTHER_REGS, OTHER_REGS],
    )  # fmt: skip


# registers per thread before they are divided among roles: 65536 over 12 warps, in multiples of 8
ENTRY_REGISTERS = 168


def hopper_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
    layout: Layout, spec: AttentionSpec, config: HopperBackwardConfig | None = None,
    keep: Callable[[RepeatedBackward], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients as `backward`, for calls assigned to "hopper".

    `backward_choice` assigns them. `keep` gets the launches, if they can be repeated. With `spec.split_columns`
    programs may share a pair with many steps, but not in packed documents. Not deterministic: the last bits of dq
    differ between runs. Besides the gradients it needs 4 * b * h * s_q * d bytes of device memory to accumulate dq in
    float32: twice the size of q. Programs that share key tiles need 1024 * d more each, together at most as much again.
    Without `config`, `chosen_config` decides.

    Packed documents: rows of a document are multiplied by zero in the tiles of its neighbours, so an infinite or NaN
    row makes these invalid too.
    """
    batch, num_heads, s_q, dim = q.shape
    num_kv_heads, s_k = k.shape[1:3]
    if config is None:
        config = chosen_config(layout, dim, num_kv_heads, s_q, spec)
    else:
        check_config(config, layout, dim, spec)
    if not fits_descriptor(dout):  # for example an expanded one
        dout, keep = dout.clone(memory_format=torch.contiguous_format), None
    sequences = batch // layout.batch_size  # sequences that share a pair
    schedule = schedule_of_call(layout, num_kv_heads, s_q, s_k, spec, sequences, config.schedule)
    packed = schedule.tiles is not None
    dq = empty_bhsd((batch, num_heads, s_q, dim), q, spec.format)
    dk = empty_bhsd((batch, num_kv_heads, s_k, dim), q, spec.format)
    dv = empty_bhsd((batch, num_kv_heads, s_k, dim), q, spec.format)
    rows = batch * num_heads * schedule.num_tiles
    shape = (num_heads, s_q, schedule.first_tile, schedule.num_tiles, spec.query_offset)
    lse2, delta = empty((2, rows * TILE.value), torch.float32, q.device)
    acc = torch.zeros(rows * 2 * dim, 32, dtype=torch.float32, device=q.device)
    cut = schedule.parts
    parts = None if cut is None else new_parts(cut.num_slots, sequences, 2, TILE.value, dim, dim, q.device)
    arguments = launch_arguments(q, k, v, dout, lse2, delta, acc, dk, dv, parts, schedule, sequences, spec, config)
    strides_in, strides_out = (*strides(out), *strides(dout)), strides(dq)
    before = (
        out, dout, lse, dlse, lse2, delta, schedule.tiles, *strides_in, *shape, dim, dlse is not None, packed
    )  # fmt: skip
    pieces = 2 * TILE.value // config.schedule.query_tile
    after = (acc, dq, schedule.tiles, *strides_out, float(spec.softmax_scale), *shape, dim, packed, pieces)
    kind = (q.dtype, dim, packed)
    aligned = tuple(x is None or x.data_ptr() % 16 == 0 for x in (out, dout, lse, dlse))
    prepare_key = ("hopper_backward_prepare", *kind, dlse is None, aligned, _specialised(strides_in))
    main_key = ("hopper_backward_kernel", *kind, spec.causal, config, cut is not None)
    finish_key = ("hopper_backward_finish", *kind, pieces, _specialised(strides_out))
    launched: list[Launched] = []

    def run(kernel: Any, programs: int, given: tuple[Any, ...], key: Any, **options: int) -> None:
        grid = (programs, 1, 1)
        compiled = launch(kernel, grid, given, cache=layout.compiled, key=key, device=q.device, **options)
        launched.append((compiled, grid, given))

    run(s2_attention_bwd_kernel_hopper_prepare, rows, before, prepare_key, num_warps=8)
    run(
        s2_attention_bwd_kernel_hopper, len(schedule.meta) * sequences, arguments, main_key,
        num_warps=4, maxnreg=ENTRY_REGISTERS,
    )  # fmt: skip
    run(s2_attention_bwd_kernel_hopper_finish, rows, after, finish_key, num_warps=4)
    if isinstance(cut, SharedTiles):
        assert parts is not None
        programs, added = launch_of_tiles(parts, cut.sums, dk, dv, spec.softmax_scale)
        add_key = ("hopper_backward_add_tiles", *kind, _specialised((*strides(dk), *strides(dv))))
        run(s2_attention_bwd_kernel_hopper_add_tiles, programs, added, add_key, num_warps=4)
    elif cut is not None:
        assert parts is not None
        programs, added = launch_of_sums(parts, cut.sums, dk, dv, spec.softmax_scale, TILE.value)
        add_key = ("hopper_backward_add_parts", *kind, _specialised((*strides(dk), *strides(dv))))
        run(s2_attention_bwd_kernel_add_parts, programs, added, add_key, num_warps=4)
    moving = (q, k, v, out, lse, dout, dlse, lse2, delta, acc, dq, dk, dv, parts)
    if keep is not None and can_repeat(launched, moving):
        keep(RepeatedBackward(launched, moving, spec.format))
    return dq, dk, dv


def _specialised(numbers: tuple[int, ...]) -> tuple[tuple[bool, ...], ...]:
    """Return the properties that Triton compiles for."""
    return tuple((n == 1, n % 16 == 0, n < 2**31) for n in numbers)


def launch_arguments(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse2: Tensor, delta: Tensor, acc: Tensor, dk: Tensor, dv: Tensor,
    parts: Tensor | None, schedule: BackwardSchedule, sequences: int, spec: AttentionSpec, config: HopperBackwardConfig,
) -> tuple[Any, ...]:  # fmt: skip
    """Return the main kernel's arguments."""
    _, num_heads, _, dim = q.shape
    rows = config.schedule.query_tile
    half = rows == TILE.value  # a warpgroup's half of dq has half of k's dimensions
    _, head_stride, row_stride = strides(dk)  # and of dv
    return (
        _tiles(q, rows), _tiles(k, half=half), _tiles(v), _tiles(dout, rows),
        *(descriptor(x, [x.numel()], [1], [rows], _FLAT) for x in (lse2, delta)),
        descriptor(acc, [acc.shape[0], 32], [32, 1], [dim * rows // TILE.value, 32], _FRAGMENTS),
        _tiles(dk, half=half), _tiles(dv),
        schedule.meta, schedule.steps, dk, dv, None if schedule.parts is None else schedule.parts.slots, parts,
        head_stride, row_stride,
        float(spec.softmax_scale), spec.softmax_scale * LOG2_E, sequences, num_heads,
        num_heads // k.shape[1], schedule.first_tile, schedule.num_tiles, spec.query_offset, k.shape[2],
        dim, config.stages, spec.causal, schedule.tiles is not None,
        parts is not None, config.consumer_registers, config.other_registers, rows,
    )  # fmt: skip


_FLAT = gl.NVMMASharedLayout.get_default_for([TILE.value], gl.float32)
_FRAGMENTS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
# keyed by the bytes of a panel's row; made once, because checking a layout takes 15 us
_PANELS = {width: gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=16, rank=4) for width in (64, 128)}


def _tiles(x: Tensor, rows: int = TILE.value, half: bool = False) -> TensorDescriptor:
    """Make a descriptor of a view's tiles of `rows` rows.

    The view is [b, h, s, d]. Panels have 64 dimensions, or `half` of them.
    """
    b, h, s, dim = x.shape
    strides = [stride if size > 1 else dim for size, stride in zip((b, h, s), x.stride(), strict=False)]
    return descriptor(x, [b, h, s, dim], [*strides, 1], [1, 1, rows, dim], _PANELS[dim if half else 128])
