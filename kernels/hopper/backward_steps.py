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

from .releases import reinterpret

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
def _store_dq(dq, dq_s, dq_free, dq_full, n, C: gl.constexpr):
    """Store the n-th half of dq for the reducer.

    Elements are in the order of the registers: four adjacent ones per thread.
    """
    N: gl.constexpr = dq.shape[1]
    x = dq.reshape([4, 2, 8, N // 8, 4, 2]).permute(3, 0, 2, 4, 1, 5).reshape([N * 2, 32])
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
def _issue_dq(ds_s, k_s, buf, z, zq, C: gl.constexpr, HL: gl.constexpr):
    """Start computing half C of dS K.

    This warpgroup's keys come first.
    """
    own = _keys_of_dq(k_s, C + z, C, ds_s.shape[2], HL)
    other = _keys_of_dq(k_s, 1 - C + z, C, ds_s.shape[2], HL)
    dq = warpgroup_mma(_ds_of_dq(ds_s, buf * 2 + C, C), own, zq, use_acc=False, is_async=True)
    return warpgroup_mma(_ds_of_dq(ds_s, buf * 2 + 1 - C, C), other, dq, is_async=True)


@gluon.jit
def _weights(scores, lse, scale_log2, key, column, MASK: gl.constexpr):
    """Return P."""
    x = scores * scale_log2 - gl.expand_dims(lse, 0)
    if MASK:
        x = gl.where(gl.expand_dims(key, 1) <= gl.expand_dims(column, 0), x, float("-inf"))
    return gl.exp2(x)


@gluon.jit
def process_step(
    q_s, dout_s, lse_s, delta_s, k_s, own, ds_s, dq_s, q_full, dout_full, free, ds_full, dq_free, dq_full,
    t, dk, dv, scale_log2, zs, zq, key, column,
    C: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr, PL: gl.constexpr, HL: gl.constexpr,
):  # fmt: skip
    """Process a tile of 64 queries.

    dP is in flight while P is computed, dv while dS is, dk while dq leaves. At head dimension 64, this warpgroup's k
    and v are in registers (`own`).
    """
    SL: gl.constexpr = zs.type.layout
    CS: gl.constexpr = gl.SliceLayout(0, SL)
    dt: gl.constexpr = q_s.dtype
    st = t % STAGES
    phase = (t // STAGES) & 1
    z = _zero(t)  # otherwise the compiler keeps all descriptors of k and v in registers, and spills
    k, v = own
    if k_s.shape[2] != TILE:
        k = k.index(C + z)
        v = v.index(C + z)
    q = q_s.index(st)
    dout = dout_s.index(st)
    mbarrier.wait(q_full.index(st), phase)
    s = warpgroup_mma(k, q.permute((1, 0)), zs, use_acc=False, is_async=True)
    lse = lse_s.index(st).load(CS)
    mbarrier.wait(dout_full.index(st), phase)
    dp = warpgroup_mma(v, dout.permute((1, 0)), zs, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(num_outstanding=1, deps=(s,))
    p = _weights(scores, lse, scale_log2, key, column, MASK)
    p16 = gl.convert_layout(p.to(dt), PL)
    dv = warpgroup_mma(p16, dout, dv, is_async=True)
    dw = warpgroup_mma_wait(num_outstanding=1, deps=(dp,))
    delta = delta_s.index(st).load(CS)
    ds = (p * (dw - gl.expand_dims(delta, 0))).to(dt)
    buf = t & 1
    ds_s.index(buf * 2 + C).store(ds)
    fence_async_shared()
    mbarrier.arrive(ds_full.index(buf * 2 + C), count=1)
    ds16 = gl.convert_layout(ds, PL)
    mbarrier.wait(ds_full.index(buf * 2 + 1 - C), (t >> 1) & 1)
    dq = _issue_dq(ds_s, k_s, buf, z, zq, C, HL)
    dv = warpgroup_mma_wait(num_outstanding=2, deps=(dv,))
    p16 = _keep(p16)
    dk = warpgroup_mma(ds16, q, dk, is_async=True)
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
def process_halves(
    q_s, dout_s, lse_s, delta_s, k_s, own, ds_s, dq_s, q_full, dout_full, free, ds_full, dq_free, dq_full,
    t, dk, dv, scale_log2, zs, zq, key, column,
    C: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr, PL: gl.constexpr, HL: gl.constexpr,
):  # fmt: skip
    """Process a tile of 128 queries as two of 64.

    A half's P and dS are computed while the other's products are in flight. That leaves room for this warpgroup's k and
    v in registers (`own`). The second dP is issued late, where the first one's registers are free.
    """
    CS: gl.constexpr = gl.SliceLayout(0, zs.type.layout)
    dt: gl.constexpr = q_s.dtype
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
    mbarrier.wait(ds_full.index(buf * 2 + 1 - C), (t >> 1) & 1)
    dq = _issue_dq(ds_s, k_s, buf, z, zq, C, HL)
    dv, dk = warpgroup_mma_wait(num_outstanding=2, deps=(dv, dk))
    p1, ds0 = _keep(p1), _keep(ds0)
    dk = warpgroup_mma(ds1, q1, dk, is_async=True)
    x = warpgroup_mma_wait(num_outstanding=1, deps=(dq,))
    _store_dq(x, dq_s, dq_free, dq_full, t, C)
    dk = warpgroup_mma_wait(num_outstanding=0, deps=(dk,))
    ds1 = _keep(ds1)
    mbarrier.arrive(free.index(st), count=1)
    return dk, dv


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
