"""A query tile's work in a consumer warpgroup of the Hopper backward."""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .releases import reinterpret, thread_barrier

TILE = gl.constexpr(64)  # keys of a warpgroup, queries of a step


@gluon.jit
def _keep(x):
    """Keep x's registers alive until here, for a wgmma in flight.

    Costs no instruction.
    """
    return gl.inline_asm_elementwise("", "=r,0", [x], dtype=x.dtype, is_pure=False, pack=2)


@gluon.jit
def _zero(t):
    """Return 0 in a way that the compiler can't see."""
    return gl.inline_asm_elementwise("and.b32 $0, $1, 0;", "=r,r", [t], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _rows_of_registers(dq):
    """Return dq's elements in the order of the registers.

    Four adjacent ones are of one thread.
    """
    N: gl.constexpr = dq.shape[1]
    return dq.reshape([4, 2, 8, N // 8, 4, 2]).permute(3, 0, 2, 4, 1, 5).reshape([N * 2, 32])


@gluon.jit
def _store_dq(dq, dq_s, dq_free, dq_full, n, C: gl.constexpr):
    """Store the n-th half of dq for the reducer."""
    x = _rows_of_registers(dq)
    mbarrier.wait(dq_free.index(C), (n & 1) ^ 1)
    dq_s.index(C).store(x)
    fence_async_shared()
    mbarrier.arrive(dq_full.index(C), count=1)


@gluon.jit
def _keys_of_dq(k_s, at, C: gl.constexpr, QT: gl.constexpr, HL: gl.constexpr):
    """Return a warpgroup's k for half C of dq.

    Half C has half of k's dimensions. Where a step has 128 queries, half C has half of these, and all dimensions.
    """
    k = k_s.index(at)
    if QT == TILE:
        k = reinterpret(k, k_s.dtype, [2, TILE, k_s.shape[2] // 2], HL).index(C)
    return k


@gluon.jit
def _ds_of_dq(ds_s, at, C: gl.constexpr):
    """Return dS of a warpgroup's keys for half C of dq."""
    ds = ds_s.index(at)
    if ds_s.shape[2] != TILE:
        ds = reinterpret(ds, ds_s.dtype, [2, TILE, TILE], ds_s.layout).index(C)
    return ds.permute((1, 0))


@gluon.jit
def _issue_dq(ds_s, k_s, buf, z, zq, C: gl.constexpr, H: gl.constexpr, HL: gl.constexpr):
    """Start computing half H of dS K.

    This warpgroup's keys come first.
    """
    own = _keys_of_dq(k_s, C + z, H, ds_s.shape[2], HL)
    other = _keys_of_dq(k_s, 1 - C + z, H, ds_s.shape[2], HL)
    dq = warpgroup_mma(_ds_of_dq(ds_s, buf * 2 + C, H), own, zq, use_acc=False, is_async=True)
    return warpgroup_mma(_ds_of_dq(ds_s, buf * 2 + 1 - C, H), other, dq, is_async=True)


@gluon.jit
def _weights(scores, lse, scale_log2, key, column, MASK: gl.constexpr):
    """Return P."""
    x = scores * scale_log2 - gl.expand_dims(lse, 0)
    if MASK:
        x = gl.where(gl.expand_dims(key, 1) <= gl.expand_dims(column, 0), x, float("-inf"))
    return gl.exp2(x)


@gluon.jit
def _issue_dp(own, dout, zs, z, C: gl.constexpr, VALUES: gl.constexpr):
    """Start computing V dO^T, with VALUES' part of v from registers.

    Returns dP. Its products are one group, with half of v in registers two.
    """
    if VALUES and dout.shape[1] == TILE:
        dp = warpgroup_mma(own[1], dout.permute((1, 0)), zs, use_acc=False, is_async=True)
    else:
        v_s, first = own
        v = v_s.index(C + z)
        dout = dout.permute((1, 0))
        HALF: gl.constexpr = v.shape[1] // 2
        if VALUES:
            dp = warpgroup_mma(first, dout.slice(0, HALF, 0), zs, use_acc=False, is_async=True)
            dp = warpgroup_mma(v.slice(HALF, HALF, 1), dout.slice(HALF, HALF, 0), dp, is_async=True)
        else:
            dp = warpgroup_mma(v, dout, zs, use_acc=False, is_async=True)
    return dp


@gluon.jit
def _issue_dv(p, dp, dout, dv, delta_s, ds_s, ds_full, st, t, C: gl.constexpr, PL: gl.constexpr):
    """Start computing P^T dO, and share dS once dP is there.

    Returns dv, P and dS as operands, of 64 queries.
    """
    CS: gl.constexpr = gl.SliceLayout(0, p.type.layout)
    p16 = gl.convert_layout(p.to(dout.dtype), PL)
    dv = warpgroup_mma(p16, dout, dv, is_async=True)
    dw = warpgroup_mma_wait(num_outstanding=1, deps=(dp,))
    delta = delta_s.index(st).load(CS)
    ds = (p * (dw - gl.expand_dims(delta, 0))).to(dout.dtype)
    buf = t & 1
    ds_s.index(buf * 2 + C).store(ds)
    fence_async_shared()
    mbarrier.arrive(ds_full.index(buf * 2 + C), count=1)
    return dv, p16, gl.convert_layout(ds, PL)


@gluon.jit
def _begin_step(
    q_s, dout_s, lse_s, delta_s, k_s, own, ds_s, q_full, dout_full, ds_full, t, dv, scale_log2, zs, key, column,
    C: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr, PL: gl.constexpr, VALUES: gl.constexpr,
):  # fmt: skip
    """Compute P and dS of 64 queries, and start computing dv.

    dP is in flight while P is computed, dv while dS is. Returns `_zero` of t, dv, P and dS as operands.
    """
    CS: gl.constexpr = gl.SliceLayout(0, zs.type.layout)
    st = t % STAGES
    phase = (t // STAGES) & 1
    z = _zero(t)  # otherwise the compiler keeps all descriptors of k and v in registers, and spills
    k = own[0] if VALUES and k_s.shape[2] == TILE else k_s.index(C + z)
    q = q_s.index(st)
    dout = dout_s.index(st)
    mbarrier.wait(q_full.index(st), phase)
    s = warpgroup_mma(k, q.permute((1, 0)), zs, use_acc=False, is_async=True)
    lse = lse_s.index(st).load(CS)
    mbarrier.wait(dout_full.index(st), phase)
    dp = _issue_dp(own, dout, zs, z, C, VALUES)
    GROUPS: gl.constexpr = 1 + (VALUES and q.shape[1] != TILE)
    scores = warpgroup_mma_wait(num_outstanding=GROUPS, deps=(s,))
    p = _weights(scores, lse, scale_log2, key, column, MASK)
    dv, p16, ds16 = _issue_dv(p, dp, dout, dv, delta_s, ds_s, ds_full, st, t, C, PL)
    return z, dv, p16, ds16


@gluon.jit
def process_step(
    q_s, dout_s, lse_s, delta_s, k_s, own, ds_s, dq_s, q_full, dout_full, free, ds_full, dq_free, dq_full,
    t, dk, dv, scale_log2, zs, zq, key, column,
    C: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr, PL: gl.constexpr, HL: gl.constexpr,
    VALUES: gl.constexpr,
):  # fmt: skip
    """Process a tile of 64 queries.

    dP is in flight while P is computed, dv while dS is (`_begin_step`), dk while dq leaves.
    """
    st = t % STAGES
    z, dv, p16, ds16 = _begin_step(
        q_s, dout_s, lse_s, delta_s, k_s, own, ds_s, q_full, dout_full, ds_full, t, dv, scale_log2, zs, key, column,
        C, STAGES, MASK, PL, VALUES,
    )  # fmt: skip
    buf = t & 1
    mbarrier.wait(ds_full.index(buf * 2 + 1 - C), (t >> 1) & 1)
    dq = _issue_dq(ds_s, k_s, buf, z, zq, C, C, HL)
    dv = warpgroup_mma_wait(num_outstanding=2, deps=(dv,))
    p16 = _keep(p16)
    dk = warpgroup_mma(ds16, q_s.index(st), dk, is_async=True)
    x = warpgroup_mma_wait(num_outstanding=1, deps=(dq,))
    _store_dq(x, dq_s, dq_free, dq_full, t, C)
    dk = warpgroup_mma_wait(num_outstanding=0, deps=(dk,))
    ds16 = _keep(ds16)
    return dk, dv


@gluon.jit
def _half(x_s, at, h: gl.constexpr, dim: gl.constexpr = 0):
    """Return 64 of a buffer's 128 queries."""
    return x_s.index(at).slice(h * TILE, TILE, dim)


@gluon.jit
def process_in_turn(
    q_s, dout_s, lse_s, delta_s, k_s, own, ds_s, dq_s, q_full, dout_full, free, ds_full, dq_free, dq_full,
    t, dk, dv, scale_log2, zs, zo,
    C: gl.constexpr, STAGES: gl.constexpr, PL: gl.constexpr, HL: gl.constexpr, VALUES: gl.constexpr,
    TURN: gl.constexpr,
):  # fmt: skip
    """Process a tile of 64 queries, computing all or none of dq.

    All of it if it is this warpgroup's TURN. Thus one warpgroup makes dq while the other one is in its next step. dq as
    one product of 128 columns reads dS once.
    """
    st = t % STAGES
    z, dv, p16, ds16 = _begin_step(
        q_s, dout_s, lse_s, delta_s, k_s, own, ds_s, q_full, dout_full, ds_full, t, dv, scale_log2, zs, 0, 0,
        C, STAGES, False, PL, VALUES,
    )  # fmt: skip
    buf = t & 1
    dk = warpgroup_mma(ds16, q_s.index(st), dk, is_async=True)
    dv = warpgroup_mma_wait(num_outstanding=1, deps=(dv,))
    p16 = _keep(p16)
    if TURN:
        mbarrier.wait(ds_full.index(buf * 2 + 1 - C), (t >> 1) & 1)
        mine, other = ds_s.index(buf * 2 + C), ds_s.index(buf * 2 + 1 - C)
        dq = warpgroup_mma(mine.permute((1, 0)), k_s.index(C + z), zo, use_acc=False, is_async=True)
        dq = warpgroup_mma(other.permute((1, 0)), k_s.index(1 - C + z), dq, is_async=True)
        dk = warpgroup_mma_wait(num_outstanding=2, deps=(dk,))
        ds16 = _keep(ds16)
        mbarrier.arrive(free.index(st), count=1)
        x = warpgroup_mma_wait(num_outstanding=0, deps=(dq,))
        x = _rows_of_registers(x)
        for c in gl.static_range(2):
            mbarrier.wait(dq_free.index(c), (t & 1) ^ 1)
        reinterpret(dq_s, gl.float32, x.shape, dq_s.layout).store(x)
        fence_async_shared()
        for c in gl.static_range(2):
            mbarrier.arrive(dq_full.index(c), count=1)
    else:
        dk = warpgroup_mma_wait(num_outstanding=0, deps=(dk,))
        ds16 = _keep(ds16)
        mbarrier.arrive(free.index(st), count=1)
    return dk, dv


@gluon.jit
def _issue_both_dv(
    p, dp0, s1, v, q0, dout0, dout1, dk, dv, lse_s, delta_s, ds_s, ds_full, st, buf, scale_log2, zs, key, column,
    C: gl.constexpr, MASK: gl.constexpr, PL: gl.constexpr,
):  # fmt: skip
    """Start computing both halves' dv and the first dk; share dS.

    The second half's P and dS are computed while the first one's products are in flight. The second dP is issued where
    the first one's registers are free.

    Args:
        p: weights of the first half.
        dp0, s1: products in flight, dP of the first half and scores of the second.
    Returns:
        dk, dv, the first dS, and the second P and dS as operands.
    """
    CS: gl.constexpr = gl.SliceLayout(0, zs.type.layout)
    dt: gl.constexpr = dout0.dtype
    p0 = gl.convert_layout(p.to(dt), PL)
    dv = warpgroup_mma(p0, dout0, dv, is_async=True)
    delta = _half(delta_s, st, 0).load(CS)
    dp = warpgroup_mma_wait(num_outstanding=2, deps=(dp0,))
    ds = (p * (dp - gl.expand_dims(delta, 0))).to(dt)
    _half(ds_s, buf * 2 + C, 0, 1).store(ds)
    ds0 = gl.convert_layout(ds, PL)
    dp1 = warpgroup_mma(v, dout1.permute((1, 0)), zs, use_acc=False, is_async=True)
    dk = warpgroup_mma(ds0, q0, dk, is_async=True)
    lse = _half(lse_s, st, 1).load(CS)
    s = warpgroup_mma_wait(num_outstanding=3, deps=(s1,))
    p = _weights(s, lse, scale_log2, key, column + TILE, MASK)
    p1 = gl.convert_layout(p.to(dt), PL)
    dv = warpgroup_mma(p1, dout1, dv, is_async=True)
    delta = _half(delta_s, st, 1).load(CS)
    dp = warpgroup_mma_wait(num_outstanding=2, deps=(dp1,))
    p0 = _keep(p0)
    ds = (p * (dp - gl.expand_dims(delta, 0))).to(dt)
    _half(ds_s, buf * 2 + C, 1, 1).store(ds)
    fence_async_shared()
    mbarrier.arrive(ds_full.index(buf * 2 + C), count=1)
    ds1 = gl.convert_layout(ds, PL)
    return dk, dv, ds0, p1, ds1


@gluon.jit
def _begin_halves(
    q_s, dout_s, lse_s, delta_s, own, ds_s, q_full, dout_full, ds_full, t, dk, dv, scale_log2, zs, key, column,
    C: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr, PL: gl.constexpr,
):  # fmt: skip
    """Compute P and dS of 128 queries in halves.

    Returns `_zero` of t, and what `_issue_both_dv` does.
    """
    CS: gl.constexpr = gl.SliceLayout(0, zs.type.layout)
    st = t % STAGES
    phase = (t // STAGES) & 1
    z = _zero(t)
    k, v = own
    buf = t & 1
    q0, q1 = _half(q_s, st, 0), _half(q_s, st, 1)
    dout0, dout1 = _half(dout_s, st, 0), _half(dout_s, st, 1)
    mbarrier.wait(q_full.index(st), phase)
    s0 = warpgroup_mma(k, q0.permute((1, 0)), zs, use_acc=False, is_async=True)
    mbarrier.wait(dout_full.index(st), phase)
    dp0 = warpgroup_mma(v, dout0.permute((1, 0)), zs, use_acc=False, is_async=True)
    s1 = warpgroup_mma(k, q1.permute((1, 0)), zs, use_acc=False, is_async=True)
    lse = _half(lse_s, st, 0).load(CS)
    s = warpgroup_mma_wait(num_outstanding=2, deps=(s0,))
    p = _weights(s, lse, scale_log2, key, column, MASK)
    dk, dv, ds0, p1, ds1 = _issue_both_dv(
        p, dp0, s1, v, q0, dout0, dout1, dk, dv, lse_s, delta_s, ds_s, ds_full, st, buf, scale_log2, zs, key, column,
        C, MASK, PL,
    )  # fmt: skip
    return z, dk, dv, ds0, p1, ds1


@gluon.jit
def process_halves(
    q_s, dout_s, lse_s, delta_s, k_s, own, ds_s, dq_s, q_full, dout_full, free, ds_full, dq_free, dq_full,
    t, dk, dv, scale_log2, zs, zq, key, column,
    C: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr, PL: gl.constexpr, HL: gl.constexpr,
    VALUES: gl.constexpr,
):  # fmt: skip
    """Process a tile of 128 queries as two of 64.

    A half's P and dS are computed while the other's products are in flight. That leaves room for this warpgroup's k and
    v in registers (`own`). The second dP is issued late, where the first one's registers are free.
    """
    st = t % STAGES
    z, dk, dv, ds0, p1, ds1 = _begin_halves(
        q_s, dout_s, lse_s, delta_s, own, ds_s, q_full, dout_full, ds_full, t, dk, dv, scale_log2, zs, key, column,
        C, STAGES, MASK, PL,
    )  # fmt: skip
    buf = t & 1
    mbarrier.wait(ds_full.index(buf * 2 + 1 - C), (t >> 1) & 1)
    dq = _issue_dq(ds_s, k_s, buf, z, zq, C, C, HL)
    dv, dk = warpgroup_mma_wait(num_outstanding=2, deps=(dv, dk))
    p1, ds0 = _keep(p1), _keep(ds0)
    dk = warpgroup_mma(ds1, _half(q_s, st, 1), dk, is_async=True)
    x = warpgroup_mma_wait(num_outstanding=1, deps=(dq,))
    _store_dq(x, dq_s, dq_free, dq_full, t, C)
    dk = warpgroup_mma_wait(num_outstanding=0, deps=(dk,))
    ds1 = _keep(ds1)
    mbarrier.arrive(free.index(st), count=1)
    return dk, dv


@gluon.jit
def process_halves_in_turn(
    q_s, dout_s, lse_s, delta_s, k_s, own, ds_s, dq_s, q_full, dout_full, free, ds_full, dq_free, dq_full,
    t, dk, dv, scale_log2, zs, zq,
    C: gl.constexpr, STAGES: gl.constexpr, PL: gl.constexpr, HL: gl.constexpr, VALUES: gl.constexpr,
    TURN: gl.constexpr,
):  # fmt: skip
    """Process 128 queries in halves, with dq as in `process_in_turn`."""
    st = t % STAGES
    z, dk, dv, ds0, p1, ds1 = _begin_halves(
        q_s, dout_s, lse_s, delta_s, own, ds_s, q_full, dout_full, ds_full, t, dk, dv, scale_log2, zs, 0, 0,
        C, STAGES, False, PL,
    )  # fmt: skip
    buf = t & 1
    dk = warpgroup_mma(ds1, _half(q_s, st, 1), dk, is_async=True)
    dv = warpgroup_mma_wait(num_outstanding=1, deps=(dv,))
    p1, ds0 = _keep(p1), _keep(ds0)
    if TURN:
        mbarrier.wait(ds_full.index(buf * 2 + 1 - C), (t >> 1) & 1)
        first = _issue_dq(ds_s, k_s, buf, z, zq, C, 0, HL)
        second = _issue_dq(ds_s, k_s, buf, z, zq, C, 1, HL)
        dk, first = warpgroup_mma_wait(num_outstanding=2, deps=(dk, first))
        ds1 = _keep(ds1)
        _store_dq(first, dq_s, dq_free, dq_full, t, 0)
        second = warpgroup_mma_wait(num_outstanding=0, deps=(second,))
        _store_dq(second, dq_s, dq_free, dq_full, t, 1)
    else:
        dk = warpgroup_mma_wait(num_outstanding=0, deps=(dk,))
        ds1 = _keep(ds1)
    mbarrier.arrive(free.index(st), count=1)
    return dk, dv


@gluon.jit
def first_scores(q_s, k, q_full, t, is_step, zs, C: gl.constexpr, STAGES: gl.constexpr):
    """Start the scores of a tile's first 64 queries.

    If there is no step t, nobody reads them. k is in registers, or shared with the other warpgroup.
    """
    st = t % STAGES
    mbarrier.wait(q_full.index(st), (t // STAGES) & 1, pred=is_step)
    if q_s.shape[1] == TILE:
        k = k.index(C + _zero(t))
    return warpgroup_mma(k, _half(q_s, st, 0).permute((1, 0)), zs, use_acc=False, is_async=True)


@gluon.jit
def process_step_ahead(
    q_s, dout_s, lse_s, delta_s, k_s, own, ds_s, dq_s, q_full, dout_full, free, ds_full, dq_free, dq_full,
    t, num_steps, s, dk, dv, scale_log2, zs, zq,
    C: gl.constexpr, STAGES: gl.constexpr, PL: gl.constexpr, HL: gl.constexpr, VALUES: gl.constexpr,
):  # fmt: skip
    """Process a tile of 64 queries whose scores are in flight.

    The next tile's scores start here. They run while dq leaves, so that the tensor cores have work where one step ends
    and the next begins. dk starts before the wait for the other warpgroup's dS. ptxas runs all products one by one if a
    step begins by another product than the scores, or if more of them than here are in flight.
    """
    CS: gl.constexpr = gl.SliceLayout(0, zs.type.layout)
    st = t % STAGES
    z = _zero(t)
    q = q_s.index(st)
    dout = dout_s.index(st)
    mbarrier.wait(dout_full.index(st), (t // STAGES) & 1)
    scores = warpgroup_mma_wait(num_outstanding=0, deps=(s,))
    dp = _issue_dp(own, dout, zs, z, C, VALUES)
    thread_barrier()  # ptxas would spread dP's products over what follows
    lse = lse_s.index(st).load(CS)
    p = _weights(scores, lse, scale_log2, 0, 0, False)
    dv, p16, ds16 = _issue_dv(p, dp, dout, dv, delta_s, ds_s, ds_full, st, t, C, PL)
    buf = t & 1
    dk = warpgroup_mma(ds16, q, dk, is_async=True)
    mbarrier.wait(ds_full.index(buf * 2 + 1 - C), (t >> 1) & 1)
    dv = warpgroup_mma_wait(num_outstanding=1, deps=(dv,))
    p16 = _keep(p16)
    dq = _issue_dq(ds_s, k_s, buf, z, zq, C, C, HL)
    if VALUES:  # which leave no registers for dS and the next scores at once
        dk = warpgroup_mma_wait(num_outstanding=2, deps=(dk,))
        ds16 = _keep(ds16)
    s = first_scores(q_s, k_s, q_full, t + 1, t + 1 < num_steps, zs, C, STAGES)
    dk, x = warpgroup_mma_wait(num_outstanding=1, deps=(dk, dq))
    if not VALUES:
        ds16 = _keep(ds16)
    _store_dq(x, dq_s, dq_free, dq_full, t, C)
    return dk, dv, s


@gluon.jit
def process_halves_ahead(
    q_s, dout_s, lse_s, delta_s, k_s, own, ds_s, dq_s, q_full, dout_full, free, ds_full, dq_free, dq_full,
    t, num_steps, s, dk, dv, scale_log2, zs, zq,
    C: gl.constexpr, STAGES: gl.constexpr, PL: gl.constexpr, HL: gl.constexpr,
    VALUES: gl.constexpr,
):  # fmt: skip
    """Process 128 queries in halves, ahead as `process_step_ahead`."""
    CS: gl.constexpr = gl.SliceLayout(0, zs.type.layout)
    st = t % STAGES
    z = _zero(t)
    k, v = own
    buf = t & 1
    q0, q1 = _half(q_s, st, 0), _half(q_s, st, 1)
    dout0, dout1 = _half(dout_s, st, 0), _half(dout_s, st, 1)
    mbarrier.wait(dout_full.index(st), (t // STAGES) & 1)
    s = warpgroup_mma_wait(num_outstanding=0, deps=(s,))
    dp0 = warpgroup_mma(v, dout0.permute((1, 0)), zs, use_acc=False, is_async=True)
    s1 = warpgroup_mma(k, q1.permute((1, 0)), zs, use_acc=False, is_async=True)
    thread_barrier()
    lse = _half(lse_s, st, 0).load(CS)
    p = _weights(s, lse, scale_log2, 0, 0, False)
    dk, dv, ds0, p1, ds1 = _issue_both_dv(
        p, dp0, s1, v, q0, dout0, dout1, dk, dv, lse_s, delta_s, ds_s, ds_full, st, buf, scale_log2, zs, 0, 0,
        C, False, PL,
    )  # fmt: skip
    dk = warpgroup_mma(ds1, q1, dk, is_async=True)
    mbarrier.wait(ds_full.index(buf * 2 + 1 - C), (t >> 1) & 1)
    dv = warpgroup_mma_wait(num_outstanding=1, deps=(dv,))
    p1, ds0 = _keep(p1), _keep(ds0)
    dq = _issue_dq(ds_s, k_s, buf, z, zq, C, C, HL)
    s = first_scores(q_s, k, q_full, t + 1, t + 1 < num_steps, zs, C, STAGES)
    dk, x = warpgroup_mma_wait(num_outstanding=1, deps=(dk, dq))
    ds1 = _keep(ds1)
    _store_dq(x, dq_s, dq_free, dq_full, t, C)
    mbarrier.arrive(free.index(st), count=1)
    return dk, dv, s


@gluon.jit
def idle_step(
    k_s, ds_s, dq_s, ds_full, dq_free, dq_full, t, zs, zq, C: gl.constexpr, HL: gl.constexpr
):  # fmt: skip
    """Process a query tile that keeps only the other warpgroup's keys.

    dS is 0 for this warpgroup's keys; its half of dq comes from the other warpgroup's.
    """
    dt: gl.constexpr = k_s.dtype
    z = _zero(t)
    buf = t & 1
    if zs.shape[1] == ds_s.shape[2]:
        ds_s.index(buf * 2 + C).store(zs.to(dt))
    else:
        for h in gl.static_range(2):
            _half(ds_s, buf * 2 + C, h, 1).store(zs.to(dt))
    fence_async_shared()
    mbarrier.arrive(ds_full.index(buf * 2 + C), count=1)
    mbarrier.wait(ds_full.index(buf * 2 + 1 - C), (t >> 1) & 1)
    other = _keys_of_dq(k_s, 1 - C + z, C, ds_s.shape[2], HL)
    dq = warpgroup_mma(_ds_of_dq(ds_s, buf * 2 + 1 - C, C), other, zq, use_acc=False, is_async=True)
    x = warpgroup_mma_wait(num_outstanding=0, deps=(dq,))
    _store_dq(x, dq_s, dq_free, dq_full, t, C)
