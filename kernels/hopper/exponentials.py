"""Powers of two, a share of them by polynomial on the FMA units.

A multiprocessor computes 16 exponentials a clock in its special function units, but 128 products. So some of the
powers are computed as FlashAttention-4 does (Zadouri et al., 2026): 2^x = 2^floor(x) * 2^fraction, where the second
factor is a polynomial of degree 3 and the first is added to its exponent. The relative error is 8.6e-5: a twentieth of
the rounding to bfloat16, a third of that to float16.
"""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

import struct

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

SHARES = 8  # a share counts eighths
# The minimax polynomial of 2^x on [0, 1) with value 1 at 0, so that 2^-127 and everything below, -inf too, give 0.
COEFFICIENTS = (1.0, 0.6951166391372681, 0.22764497995376587, 0.07706724107265472)
_LEAST = -127.0
_SHIFT = 12582912.0  # 1.5 * 2^23: in a sum with it, the lowest bits are the integer part


def _literal(x: float) -> str:
    return "0f" + struct.pack(">f", x).hex().upper()


def assembly(software: int) -> str:
    """Return PTX for eight powers of two; the polynomial computes `software` of them."""
    least, shift = _literal(_LEAST), _literal(_SHIFT)
    c0, c1, c2, c3 = (_literal(c) for c in COEFFICIENTS)
    lines = [".reg .f32 x, n, f, p;", ".reg .b32 i, j;"]
    for element in range(SHARES):
        to, of = f"${element}", f"${SHARES + element}"
        # evenly distributed, so that both units have work throughout
        if (element + 1) * software // SHARES == element * software // SHARES:
            lines.append(f"ex2.approx.ftz.f32 {to}, {of};")
            continue
        lines += [
            f"max.NaN.f32 x, {of}, {least};",
            f"add.rm.f32 n, x, {shift};",
            f"sub.rn.f32 f, n, {shift};",
            "sub.rn.f32 f, x, f;",
            f"fma.rn.f32 p, f, {c3}, {c2};",
            f"fma.rn.f32 p, p, f, {c1};",
            f"fma.rn.f32 p, p, f, {c0};",
            "mov.b32 i, n;",
            "mov.b32 j, p;",
            "shl.b32 i, i, 23;",
            "add.s32 i, i, j;",
            f"mov.b32 {to}, i;",
        ]
    return "{ " + " ".join(lines) + " }"


_ASSEMBLIES = gl.constexpr(tuple(assembly(software) for software in range(SHARES + 1)))
_AT_ONCE = gl.constexpr(SHARES)
_CONSTRAINTS = gl.constexpr(",".join(["=f"] * SHARES + ["f"] * SHARES))


@gluon.jit
def exp2(x, SOFTWARE: gl.constexpr):
    """Compute 2^x for x < 128, SOFTWARE eighths of it by polynomial.

    Not a number becomes infinite or stays so.
    """
    if SOFTWARE == 0:
        return gl.exp2(x)
    return gl.inline_asm_elementwise(
        _ASSEMBLIES[SOFTWARE], _CONSTRAINTS, [x], dtype=gl.float32, is_pure=True, pack=_AT_ONCE
    )
