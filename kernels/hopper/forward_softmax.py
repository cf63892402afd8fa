"""The forward's softmax in registers."""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_LAG = gl.constexpr(8.0)  # in base 2: weights are at most 256, which every dtype holds as exactly as 1


def _scale(elements: int) -> tuple[gl.constexpr, gl.constexpr]:
    """Return inline assembly that scales a thread's elements, and its constraints.

    Operands are the elements, their factors, and for each whether the warp scales.
    """
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * elements + i};" for i in range(elements))
    code = f"{{ .reg .pred p; setp.eq.s32 p, ${3 * elements}, 0; @p bra SKIP; {products} SKIP: }}"
    constraints = ["=r"] * elements + [str(i) for i in range(elements)] + ["r"] * (2 * elements)
    return gl.constexpr(code), gl.constexpr(",".join(constraints))


_SCALE_64, _CONSTRAINTS_64 = _scale(64)
_SCALE_32, _CONSTRAINTS_32 = _scale(32)


@gluon.jit
def softmax(scores, peak, total, scale_log2):
    """Compute weights, and update the running maximum (in base 2) and sum.

    Also returns the factor by which earlier sums are scaled: 1 unless a row's maximum grew by more than _LAG. The sum
    has one part per lane (`no_sum`).
    """
    # of a thread's 32 scores in a row, eight chains of four, then one of eight: chains do not wait for each other
    most = gl.max(gl.max(gl.reshape(scores, [scores.shape[0], 4, scores.shape[1] // 4]), 1), 1)
    most = gl.convert_layout(most, peak.type.layout, assert_trivial=True)
    new_peak = gl.where(most * scale_log2 > peak + _LAG, most * scale_log2, peak)
    decay = gl.exp2(peak - new_peak)
    weights = gl.exp2(scores * scale_log2 - gl.expand_dims(new_peak, 1))
    part_decay = gl.convert_layout(decay, gl.SliceLayout(1, total.type.layout), assert_trivial=True)
    total = total * gl.expand_dims(part_decay, 1) + _sum_of_lanes(weights)
    return weights, new_peak, total, decay


@gluon.jit
def _sum_of_lanes(weights):
    """Add up each lane's part of a row, which four lanes share."""
    lanes = gl.reshape(weights, [weights.shape[0], weights.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(lanes, 3), 1)


@gluon.jit
def no_sum(scores):
    """Return 0 for each lane of each row."""
    return gl.zeros_like(_sum_of_lanes(scores))


@gluon.jit
def row_sum(total, peak):
    """Return each row's sum, in the layout of its maximum."""
    return gl.convert_layout(gl.sum(total, 1), peak.type.layout, assert_trivial=True)


@gluon.jit
def scaled(acc, decay):
    """Multiply rows of sums by `decay`.

    A warp skips it if all of its rows keep their maxima.
    """
    factor = gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, acc.type.layout)), 1)
    changed = gl.inline_asm_elementwise(
        "{ .reg .pred p, q; setp.ne.f32 p, $2, 0f3F800000; setp.ne.or.f32 p, $3, 0f3F800000, p;"
        " vote.sync.any.pred q, p, -1; selp.s32 $0, 1, 0, q; mov.b32 $1, $0; }",
        "=&r,=&r,r,r", [decay], dtype=gl.int32, is_pure=False, pack=2,
    )  # fmt: skip
    changed = gl.expand_dims(gl.convert_layout(changed, gl.SliceLayout(1, acc.type.layout)), 1)
    _, factor = gl.broadcast(acc, factor)
    _, changed = gl.broadcast(acc, changed)
    wide: gl.constexpr = acc.shape[1] == 128
    return gl.inline_asm_elementwise(
        _SCALE_64 if wide else _SCALE_32, _CONSTRAINTS_64 if wide else _CONSTRAINTS_32,
        [acc, factor, changed], dtype=gl.float32, is_pure=False, pack=acc.shape[1] // 2,
    )  # fmt: skip
