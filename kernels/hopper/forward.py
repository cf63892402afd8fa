"""Gluon forward of block-sparse attention for Hopper, specialised by warps.

It computes what `forward.py` does. A program has one producer warp, which loads by TMA, and two consumer warpgroups of
64 query rows each. It is persistent: it takes tiles of 128 rows, late ones first, until none is left. In each step (128
keys), the product q k^T of this step and the product of the previous step's weights with v are in flight together; the
softmax runs during the second. This is the order of FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608).
"""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..bounds_cache import of_documents
from ..configs import multiprocessors
from ..fp_fusion import with_fp_fusion
from ..launch import launch
from ..spec import AttentionSpec, empty, empty_bhsd
from ..tiles import LOG2_E
from ..topk_layout import Layout, TopKLayout
from .descriptors import descriptor
from .documents import COLUMNS, document_table
from .forward_config import CONFIGS, HopperConfig
from .forward_schedule import TILE, ForwardSchedule, forward_schedule
from .forward_softmax import no_sum, row_sum, scaled, softmax
from .releases import async_load, async_store, reinterpret, thread_barrier
from .repeated import RepeatedForward, can_repeat
from .support import PANEL, padded_to_panels
from .topk_forward_schedule import topk_forward_schedule
from .weight_registers import compute_here, pack, stay_live, unpack

_LN_2 = gl.constexpr(0.6931471805599453)
_LOWEST = gl.constexpr(-1.0e30)  # below every score; finite, so that rows without keys need no special case
_STEP = gl.constexpr(TILE)  # keys per step
_HALF = gl.constexpr(TILE // 2)  # query rows per consumer
_PANEL = gl.constexpr(PANEL)
_COLUMNS = gl.constexpr(COLUMNS)
_BARRIER = gl.constexpr(mbarrier.MBarrierLayout())


@gluon.jit
def _num_items(num_items):
    """Count this program's items."""
    programs = gl.num_programs(0)
    whole = num_items // programs
    place = gl.program_id(0)
    if whole % 2 == 1:
        place = programs - 1 - place
    return whole + (place < num_items - whole * programs).to(gl.int32)


@gluon.jit
def _item(
    n, num_tiles, first_tile, num_heads, tiles_per_pattern, query_offset, s_q, head_order, head_slot, documents,
    PACKED: gl.constexpr, BATCHED: gl.constexpr,
):  # fmt: skip
    """Locate this program's n-th item.

    Returns batch, head, tile, row of the step table, offset and end. The row of q at a position is position + offset;
    it exists if it is at least 0 and below the end. Items are dealt to the programs back and forth, so that no program
    gets the longest item of every round.
    """
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    if n % 2 == 1:
        place = programs - 1 - place
    item = n * programs + place
    batch_head = item // num_tiles
    if PACKED:
        entry = documents + (1 + item - batch_head * num_tiles) * _COLUMNS
        shift = gl.load(entry)
        end = shift + gl.load(entry + 1)
        tile = gl.load(entry + 2)
    else:
        shift = 0 - query_offset
        end = s_q
        tile = first_tile + num_tiles - 1 - (item - batch_head * num_tiles)
    batch = batch_head // num_heads
    ranked = batch_head - batch * num_heads
    at = batch_head if BATCHED else ranked
    head = gl.load(head_order + at)
    row = gl.load(head_slot + at) * tiles_per_pattern + tile
    return batch, head, tile, row, shift, end


@gluon.jit
def _steps_of_row(step_offsets, row, BATCHED: gl.constexpr):
    """Return begin and end of the steps of a table row."""
    at = step_offsets + (row * 2 if BATCHED else row)
    return gl.load(at), gl.load(at + 1)


@gluon.jit
def _load_panels(desc, batch, head, row, panels, first, STRIDE: gl.constexpr, PANELS: gl.constexpr, barrier):
    """Start loading all panels of one box of rows."""
    for panel in gl.static_range(PANELS):
        async_load(desc, [batch, head, row, panel * _PANEL], barrier, panels.index(first + panel * STRIDE))


@gluon.jit
def _load_step(
    desc, batch, head, chunks, step, shift, s_k, panels, stage, barrier,
    CHUNK: gl.constexpr, PANELS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Start the loads of one step's keys or values."""
    PER_STEP: gl.constexpr = _STEP // CHUNK
    mbarrier.expect(barrier, PANELS * PER_STEP * desc.block_type.nbytes)
    for part in gl.static_range(PER_STEP):
        entry = gl.load(chunks + step * PER_STEP + part)
        key = (entry >> 2) * CHUNK
        if PACKED:
            # padding reads zeros after the last row, not another document's values
            key = gl.where(entry & 3 == 0, s_k, key + shift)
        first = stage * (PANELS * PER_STEP) + part
        _load_panels(desc, batch, head, key, panels, first, PER_STEP, PANELS, barrier)


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    head_order, head_slot, step_offsets, chunks, documents,
    num_items, num_tiles, first_tile, num_heads, group, tiles_per_pattern, query_offset, s_q, s_k,
    CHUNK: gl.constexpr, PACKED: gl.constexpr, BATCHED: gl.constexpr,
    Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    """Run the producer warp.

    It starts loads in the order in which the consumers wait for them.
    """
    PER_STEP: gl.constexpr = _STEP // CHUNK
    dtype: gl.constexpr = q_desc.dtype
    box_q: gl.constexpr = q_desc.layout
    box_kv: gl.constexpr = k_desc.layout
    PANELS: gl.constexpr = k_smem.shape[2] // _PANEL
    V_PANELS: gl.constexpr = v_smem.shape[2] // _PANEL
    q_panels = reinterpret(q_smem, dtype, [2 * Q_STAGES * PANELS, 1, 1, _HALF, _PANEL], box_q)
    k_panels = reinterpret(k_smem, dtype, [K_STAGES * PANELS * PER_STEP, 1, 1, CHUNK, _PANEL], box_kv)
    v_panels = reinterpret(v_smem, dtype, [V_STAGES * V_PANELS * PER_STEP, 1, 1, CHUNK, _PANEL], box_kv)
    k_count = 0
    v_count = 0
    for n in range(0, _num_items(num_items)):
        batch, head, tile, row, shift, _ = _item(
            n, num_tiles, first_tile, num_heads, tiles_per_pattern, query_offset, s_q, head_order, head_slot,
            documents, PACKED, BATCHED,
        )  # fmt: skip
        begin, end = _steps_of_row(step_offsets, row, BATCHED)
        kv_head = head // group
        # first keys, then queries: the memory of the queries becomes free later
        stage = k_count % K_STAGES
        mbarrier.wait(k_empty.index(stage), (k_count // K_STAGES & 1) ^ 1)
        _load_step(
            k_desc, batch, kv_head, chunks, begin, shift, s_k, k_panels, stage, k_full.index(stage),
            CHUNK, PANELS, PACKED,
        )  # fmt: skip
        k_count += 1
        q_stage = n % Q_STAGES
        for half in gl.static_range(2):
            slot = q_stage * 2 + half
            mbarrier.wait(q_empty.index(slot), (n // Q_STAGES & 1) ^ 1)
            mbarrier.expect(q_full.index(slot), PANELS * q_desc.block_type.nbytes)
            q_row = tile * (2 * _HALF) + half * _HALF + shift
            _load_panels(q_desc, batch, head, q_row, q_panels, slot * PANELS, 1, PANELS, q_full.index(slot))
        for step in range(begin + 1, end):
            stage = k_count % K_STAGES
            mbarrier.wait(k_empty.index(stage), (k_count // K_STAGES & 1) ^ 1)
            _load_step(
                k_desc, batch, kv_head, chunks, step, shift, s_k, k_panels, stage, k_full.index(stage),
                CHUNK, PANELS, PACKED,
            )  # fmt: skip
            k_count += 1
            v_stage = v_count % V_STAGES
            mbarrier.wait(v_empty.index(v_stage), (v_count // V_STAGES & 1) ^ 1)
            _load_step(
                v_desc, batch, kv_head, chunks, step - 1, shift, s_k, v_panels, v_stage, v_full.index(v_stage),
                CHUNK, V_PANELS, PACKED,
            )  # fmt: skip
            v_count += 1
        v_stage = v_count % V_STAGES
        mbarrier.wait(v_empty.index(v_stage), (v_count // V_STAGES & 1) ^ 1)
        _load_step(
            v_desc, batch, kv_head, chunks, end - 1, shift, s_k, v_panels, v_stage, v_full.index(v_stage),
            CHUNK, V_PANELS, PACKED,
        )  # fmt: skip
        v_count += 1


@gluon.jit
def _masked(scores, chunks, step, last_key, columns, HALF: gl.constexpr, CHUNK: gl.constexpr):
    """Set scores of chunks not kept and later keys to -inf.

    A chunk is masked if this half does not keep it, a key if it comes after the row's last.
    """
    PER_STEP: gl.constexpr = _STEP // CHUNK
    entry = gl.load(chunks + step * PER_STEP)
    # relative to the step's first column; below all columns if the half does not keep the chunk
    last_column = gl.where((entry >> HALF) & 1 == 1, last_key - (entry >> 2) * CHUNK, -1)
    last_column = gl.expand_dims(last_column, 1)
    columns = gl.expand_dims(columns, 0)
    if PER_STEP == 2:
        entry = gl.load(chunks + step * PER_STEP + 1)
        second = gl.where((entry >> HALF) & 1 == 1, last_key - (entry >> 2) * CHUNK + CHUNK, -1)
        last_column = gl.where(columns < CHUNK, last_column, gl.expand_dims(second, 1))
    return gl.where(last_column >= columns, scores, float("-inf"))


@gluon.jit
def _attend(
    q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, count, acc, weights, peak, total, scale_log2,
    zeros, chunks, step, last_key, columns,
    HALF: gl.constexpr, CHUNK: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    MASK: gl.constexpr,
):  # fmt: skip
    """Compute scores and weights of step `count`.

    Meanwhile, multiply the previous step's weights by its values.
    """
    dtype: gl.constexpr = v_smem.dtype
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc.type.layout, k_width=2)
    stage = count % K_STAGES
    v_stage = (count - 1) % V_STAGES
    mbarrier.wait(k_full.index(stage), count // K_STAGES & 1)
    scores = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    # under the product, so that the exposed end of a step is short
    packed = pack(weights, dtype)
    mbarrier.wait(v_full.index(v_stage), (count - 1) // V_STAGES & 1)
    product = warpgroup_mma(unpack(packed, dtype, operand), v_smem.index(v_stage), acc, is_async=True)
    scores = warpgroup_mma_wait(num_outstanding=1, deps=(scores,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    if MASK:
        scores = _masked(scores, chunks, step, last_key, columns, HALF, CHUNK)
    weights, peak, total, decay = softmax(scores, peak, total, scale_log2)
    total = compute_here(total)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(product,))
    packed = stay_live(packed)
    mbarrier.arrive(v_empty.index(v_stage), count=1)
    return scaled(acc, decay), weights, peak, total


@gluon.jit
def _clear_beyond(v_smem, stage, chunks, step, num_keys, CHUNK: gl.constexpr):
    """Zero the values of a step's keys from `num_keys` on.

    They belong to another document, and 0 times its infinities would be NaN. Both consumers write the same zeros, so
    that neither waits for the other.
    """
    PER_STEP: gl.constexpr = _STEP // CHUNK
    PANELS: gl.constexpr = v_smem.shape[2] // _PANEL
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    boxes = reinterpret(v_smem, v_smem.dtype, [v_smem.shape[0] * PANELS * PER_STEP, CHUNK, _PANEL], v_smem.layout)
    row = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout))
    for part in gl.static_range(PER_STEP):
        key = (gl.load(chunks + step * PER_STEP + part) >> 2) * CHUNK + row
        for panel in gl.static_range(PANELS):
            box = boxes.index(stage * (PANELS * PER_STEP) + panel * PER_STEP + part)
            values = box.load(layout)
            box.store(gl.where(gl.expand_dims(key < num_keys, 1), values, gl.zeros_like(values)))
    fence_async_shared()
    thread_barrier()


@gluon.jit
def _store_rows(box, out, begin, end, batch, head, first, out_batch, out_head, out_row, V_ROW: gl.constexpr):
    """Write the rows of a tile that lie in [begin, end).

    Rows of `out` have V_ROW elements; strides count rows.
    """
    ROWS: gl.constexpr = box.shape[0]
    COLUMNS: gl.constexpr = box.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])
    row = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    column = gl.expand_dims(gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout)), 0)
    base = batch.to(gl.int64) * out_batch + head.to(gl.int64) * out_head
    at = (base + row.to(gl.int64) * out_row) * V_ROW
    keep = gl.expand_dims((row >= begin) & (row < end), 1) & (column < V_ROW)
    gl.store(out + (gl.expand_dims(at, 1) + column), box.load(layout), mask=keep)


@gluon.jit
def _consume(
    out_desc, out, out_batch, out_head, out_row, lse,
    q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    head_order, head_slot, step_offsets, full_offsets, chunks, documents, scale_log2,
    num_items, num_tiles, first_tile, num_heads, tiles_per_pattern, query_offset, s_q, s_k,
    HALF: gl.constexpr, V_ROW: gl.constexpr, CHUNK: gl.constexpr, CAUSAL: gl.constexpr,
    PACKED: gl.constexpr, PARTIAL: gl.constexpr, BATCHED: gl.constexpr,
    Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    """Run a consumer warpgroup: its 64 rows of every tile.

    The output reuses the shared memory of the queries.
    """
    dtype: gl.constexpr = v_smem.dtype
    DIM: gl.constexpr = q_smem.shape[2]
    V_DIM: gl.constexpr = v_smem.shape[2]
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, _STEP, 16]
    )
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, V_DIM, 16]
    )
    weights_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc_layout, k_width=2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    rows = gl.arange(0, _HALF, layout=rows_layout)
    columns = gl.arange(0, _STEP, layout=gl.SliceLayout(0, scores_layout))
    zeros = gl.zeros([_HALF, _STEP], gl.float32, scores_layout)
    SLOTS: gl.constexpr = 2 * Q_STAGES * (DIM // V_DIM)
    out_rows = reinterpret(q_smem, dtype, [SLOTS, _HALF, V_DIM], q_smem.layout)
    out_boxes = reinterpret(q_smem, dtype, [SLOTS, 1, 1, _HALF, V_DIM], out_desc.layout)
    count = 0
    for n in range(0, _num_items(num_items)):
        _, _, tile, row, shift, last = _item(
            n, num_tiles, first_tile, num_heads, tiles_per_pattern, query_offset, s_q, head_order, head_slot,
            documents, PACKED, BATCHED,
        )  # fmt: skip
        begin, end = _steps_of_row(step_offsets, row, BATCHED)
        full = gl.load(full_offsets + row)
        first = tile * (2 * _HALF) + HALF * _HALF
        last_key = gl.full([_HALF], s_k - 1, gl.int32, rows_layout)
        if CAUSAL:
            last_key = gl.minimum(last_key, first + rows)
        slot = n % Q_STAGES * 2 + HALF
        q = q_smem.index(slot)
        peak = gl.full([_HALF], _LOWEST, gl.float32, rows_layout)
        total = no_sum(zeros)
        acc = gl.zeros([_HALF, V_DIM], gl.float32, acc_layout)

        stage = count % K_STAGES
        mbarrier.wait(q_full.index(slot), n // Q_STAGES & 1)
        mbarrier.wait(k_full.index(stage), count // K_STAGES & 1)
        scores = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        scores = _masked(scores, chunks, begin, last_key, columns, HALF, CHUNK)
        weights, peak, total, _ = softmax(scores, peak, total, scale_log2)
        if PACKED:  # noqa: SIM102 (the compiler's constant, apart from the device's condition)
            # only a document's last tile sees keys beyond it, in its first step
            if (tile + 1) * (2 * _HALF) > last - shift:
                v_stage = count % V_STAGES
                mbarrier.wait(v_full.index(v_stage), count // V_STAGES & 1)
                _clear_beyond(v_smem, v_stage, chunks, begin, last - shift, CHUNK)
        count += 1
        for step in range(begin + 1, full):
            acc, weights, peak, total = _attend(
                q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, count, acc, weights, peak, total,
                scale_log2, zeros, chunks, step, last_key, columns, HALF, CHUNK, K_STAGES, V_STAGES, True,
            )  # fmt: skip
            count += 1
        for step in range(full, end):
            acc, weights, peak, total = _attend(
                q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, count, acc, weights, peak, total,
                scale_log2, zeros, chunks, step, last_key, columns, HALF, CHUNK, K_STAGES, V_STAGES, False,
            )  # fmt: skip
            count += 1
        v_stage = (count - 1) % V_STAGES
        mbarrier.wait(v_full.index(v_stage), (count - 1) // V_STAGES & 1)
        packed = pack(weights, dtype)
        product = warpgroup_mma(unpack(packed, dtype, weights_layout), v_smem.index(v_stage), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(product,))
        mbarrier.arrive(v_empty.index(v_stage), count=1)

        total = row_sum(total, peak)
        # computed again, which takes fewer registers than keeping it
        batch, head, tile, _, shift, last = _item(
            n, num_tiles, first_tile, num_heads, tiles_per_pattern, query_offset, s_q, head_order, head_slot,
            documents, PACKED, BATCHED,
        )  # fmt: skip
        first = tile * (2 * _HALF) + HALF * _HALF + shift
        position = first + rows
        at = (batch.to(gl.int64) * num_heads + head) * s_q
        in_range = (position >= 0) & (position < last)
        # without keys: the logarithm of 0 is -inf
        gl.store(lse + at + position, (peak + gl.log2(total)) * _LN_2, mask=in_range)
        inverse = 1.0 / gl.where(total == 0.0, 1.0, total)
        acc = acc * gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, acc_layout)), 1)
        # all products with q are done: the output takes its memory
        out_slot = slot * (DIM // V_DIM)
        out_rows.index(out_slot).store(acc.to(dtype))
        fence_async_shared()
        thread_barrier()
        if PARTIAL:
            # TMA would overwrite the next document, and may not store to negative rows
            if (first >= 0) & (first + _HALF <= last):
                async_store(out_desc, [batch, head, first, 0], out_boxes.index(out_slot))
            else:
                _store_rows(
                    out_rows.index(out_slot), out, 0, last, batch, head, first, out_batch, out_head, out_row, V_ROW
                )
                thread_barrier()
        else:
            async_store(out_desc, [batch, head, first, 0], out_boxes.index(out_slot))
        tma.store_wait(pendings=0)
        mbarrier.arrive(q_empty.index(slot), count=1)


@with_fp_fusion
@gluon.jit(
    do_not_specialize=[
        "num_items", "num_tiles", "first_tile", "num_heads", "group", "tiles_per_pattern", "query_offset", "s_q", "s_k",
        "out_batch", "out_head", "out_row",
    ]
)  # fmt: skip
def s2_attention_fwd_kernel_hopper(
    q_desc, k_desc, v_desc, out_desc, lse, head_order, head_slot, step_offsets, full_offsets, chunks, scale_log2,
    num_items, num_tiles, first_tile, num_heads, group, tiles_per_pattern, query_offset, s_q, s_k,
    documents, out, out_batch, out_head, out_row,
    DIM: gl.constexpr, V_DIM: gl.constexpr, V_ROW: gl.constexpr, CHUNK: gl.constexpr, CAUSAL: gl.constexpr,
    PACKED: gl.constexpr, PARTIAL: gl.constexpr, BATCHED: gl.constexpr,
    Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    """Allocate shared memory and barriers, and start the three roles.

    PACKED: `documents` is a `document_table`. PARTIAL: tiles may begin before the first row of q, or end inside `out`,
    whose rows have V_ROW elements; otherwise neither is given. BATCHED: see `ForwardSchedule`.
    """
    if PACKED:
        num_tiles = gl.load(documents)
        num_items = num_tiles * num_heads
    dtype: gl.constexpr = q_desc.dtype
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_smem = gl.allocate_shared_memory(dtype, [2 * Q_STAGES, _HALF, DIM], swizzled)
    k_smem = gl.allocate_shared_memory(dtype, [K_STAGES, _STEP, DIM], swizzled)
    v_smem = gl.allocate_shared_memory(dtype, [V_STAGES, _STEP, V_DIM], swizzled)
    q_full = gl.allocate_shared_memory(gl.int64, [2 * Q_STAGES, 1], _BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [2 * Q_STAGES, 1], _BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], _BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], _BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], _BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], _BARRIER)
    for slot in gl.static_range(2 * Q_STAGES):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(q_empty.index(slot), count=1)
    for stage in gl.static_range(K_STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
    for stage in gl.static_range(V_STAGES):
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize([
        (_consume, (
            out_desc, out, out_batch, out_head, out_row, lse,
            q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
            head_order, head_slot, step_offsets, full_offsets, chunks, documents, scale_log2,
            num_items, num_tiles, first_tile, num_heads, tiles_per_pattern, query_offset, s_q, s_k,
            0, V_ROW, CHUNK, CAUSAL, PACKED, PARTIAL, BATCHED, Q_STAGES, K_STAGES, V_STAGES,
        )),
        (_consume, (
            out_desc, out, out_batch, out_head, out_row, lse,
            q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
            head_order, head_slot, step_offsets, full_offsets, chunks, documents, scale_log2,
            num_items, num_tiles, first_tile, num_heads, tiles_per_pattern, query_offset, s_q, s_k,
            1, V_ROW, CHUNK, CAUSAL, PACKED, PARTIAL, BATCHED, Q_STAGES, K_STAGES, V_STAGES,
        )),
        (_produce, (
            q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
            head_order, head_slot, step_offsets, chunks, documents,
            num_items, num_tiles, first_tile, num_heads, group, tiles_per_pattern, query_offset, s_q, s_k,
            CHUNK, PACKED, BATCHED, Q_STAGES, K_STAGES, V_STAGES,
        )),
    ], [4, 1], [CONSUMER_REGS, PRODUCER_REGS])  # fmt: skip


# registers per thread before they are divided among roles: 65536 over 12 warps, in multiples of 8
ENTRY_REGISTERS = 168
_SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


def hopper_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, spec: AttentionSpec, config: HopperConfig | None = None,
    keep: Callable[[RepeatedForward], None] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute output and log-sum-exp as `forward.forward`.

    Takes the calls that `kernel_choice` assigns to "hopper". `keep` gets the launch, if it can be repeated.
    """
    batch, num_heads, s_q, dim = q.shape
    out = empty_bhsd((batch, num_heads, s_q, v.shape[3]), q, spec.format)
    lse = empty((batch, num_heads, s_q), torch.float32, q.device)
    config = config or CONFIGS[padded_to_panels(dim), min(layout.block_size, TILE)]
    documents, bounds = None, spec.cu_seqlens
    if bounds is not None:
        build = partial(document_table, bounds, s_q, TILE, layout.compiled)
        documents = of_documents(layout.cache, "document_table", bounds, s_q, build)
    num_items, arguments, constants = launch_arguments(q, k, v, out, lse, documents, layout, spec, config)
    grid = (min(num_items, multiprocessors(q.device)), 1, 1)
    compiled = launch(
        s2_attention_fwd_kernel_hopper, grid, (*arguments, *constants),
        cache=layout.compiled, key=("hopper_forward_kernel", q.dtype, *constants), device=q.device,
        num_warps=4, maxnreg=ENTRY_REGISTERS,
    )  # fmt: skip
    launched = (compiled, grid, (*arguments, *constants))
    if keep is not None and can_repeat([launched], (q, k, v, out, lse)):
        keep(RepeatedForward(launched, q, k, v, out, lse, spec.format))
    return out, lse


def launch_arguments(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, documents: Tensor | None, layout: Layout,
    spec: AttentionSpec, config: HopperConfig,
) -> tuple[int, tuple[Any, ...], tuple[Any, ...]]:  # fmt: skip
    """Return the maximum number of tiles, and the kernel's arguments and constants."""
    batch, num_heads, s_q, dim = q.shape
    num_kv_heads, s_k, v_dim = v.shape[1:]
    offset = spec.query_offset
    first_tile = offset // TILE
    num_tiles = -(-(offset + s_q) // TILE) - first_tile if documents is None else len(documents) - 1
    num_items = batch * num_heads * num_tiles
    schedule = _schedule(layout, causal=spec.causal, query_end=offset + s_q, s_k=s_k)
    chunk, padded_v_dim = schedule.chunk_keys, padded_to_panels(v_dim)
    partial = documents is not None or offset % TILE != 0
    out_rows = tuple(stride // v_dim for stride in out.stride()[:3])
    arguments = (
        _descriptor(q, TILE // 2, PANEL), _descriptor(k, chunk, PANEL), _descriptor(v, chunk, PANEL),
        _descriptor(out, TILE // 2, padded_v_dim),
        lse, schedule.head_order, schedule.head_slot, schedule.step_offsets, schedule.full_offsets, schedule.chunks,
        spec.softmax_scale * LOG2_E, num_items, num_tiles, first_tile, num_heads, num_heads // num_kv_heads,
        schedule.tiles_per_pattern, offset, s_q, s_k,
        documents, *((out, *out_rows) if partial else (None, None, None, None)),
    )  # fmt: skip
    constants = (
        padded_to_panels(dim), padded_v_dim, v_dim if partial else padded_v_dim, chunk, spec.causal,
        documents is not None, partial, schedule.batched, config.q_stages, config.k_stages, config.v_stages,
        config.consumer_registers, config.producer_registers,
    )  # fmt: skip
    return num_items, arguments, constants


def _schedule(layout: Layout, *, causal: bool, query_end: int, s_k: int) -> ForwardSchedule:
    if isinstance(layout, TopKLayout):
        key = ("hopper_forward_schedule", causal, s_k)
        return layout.built(key, lambda: topk_forward_schedule(layout, causal=causal, s_k=s_k))
    return forward_schedule(layout, causal=causal, query_end=query_end, s_k=s_k)


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Make a descriptor of a view [b, h, s, d].

    Boxes are `rows` x `columns` of one batch and head.
    """
    shape = list(x.shape)
    b, h, s, _ = x.stride()
    # torch leaves strides along dimensions of size 1 arbitrary; TMA requires multiples of 16 bytes
    strides = [64 if shape[0] == 1 else b, 64 if shape[1] == 1 else h, 64 if shape[2] == 1 else s, 1]
    return descriptor(x, shape, strides, [1, 1, rows, columns], _SWIZZLED)
