"""Keep the forward's weights in registers while products run.

The weights of one step are the first operand of a product that is in flight during the next one. Each function is a
piece of inline assembly that makes LLVM or ptxas keep the order and the registers that this needs.
"""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def stay_live(x):
    """Keep x's registers alive for a product in flight.

    Costs no instruction.
    """
    return gl.inline_asm_elementwise("", "=r,0", [x], dtype=x.dtype, is_pure=False, pack=1)


@gluon.jit
def pack(x, dtype: gl.constexpr):
    """Pack float32 [m, n] into int32 [m, n / 2].

    Each int32 holds two 16-bit numbers. Thus LLVM carries whole registers from step to step.
    """
    even, odd = gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    kind: gl.constexpr = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    return gl.inline_asm_elementwise(
        "cvt.rn." + kind + ".f32 $0, $2, $1;", "=r,r,r", [even, odd], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def unpack(x, dtype: gl.constexpr, layout: gl.constexpr):
    """Unpack the result of `pack` as the first operand of a product."""
    even = gl.inline_asm_elementwise(
        "{ .reg .b16 h; mov.b32 {$0, h}, $1; }", "=h,r", [x], dtype=gl.int16, is_pure=True, pack=1
    )
    odd = gl.inline_asm_elementwise(
        "{ .reg .b16 h; mov.b32 {h, $0}, $1; }", "=h,r", [x], dtype=gl.int16, is_pure=True, pack=1
    )
    pairs = gl.reshape(gl.join(even, odd), [x.shape[0], x.shape[1] * 2]).to(dtype, bitcast=True)
    return gl.convert_layout(pairs, layout, assert_trivial=True)


@gluon.jit
def compute_here(x):
    """Return x, which is >= 0, and force its computation here.

    The compiler may not move the computation below. Without this, ptxas waits for the product before it computes the
    exponentials. The code is a store that never happens; with a branch instead, ptxas would run all products one by one
    (C7518).
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.lt.f32 p, $1, 0f00000000; @p st.volatile.shared.b32 [$1], $1; mov.b32 $0, $1; }",
        "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1,
    )  # fmt: skip
