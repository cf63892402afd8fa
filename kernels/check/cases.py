"""Cases of `s2train.kernels.check`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Case:
    """A random problem to compare with the oracle.

    Each head keeps random blocks with probability `keep`.
    """

    name: str
    dtype: str = "bfloat16"
    heads: int = 8
    kv_heads: int = 2
    dim: int = 128
    v_dim: int | None = None
    block: int = 64
    s_q: int = 1000
    s_k: int | None = None  # None: query_offset + s_q
    query_offset: int = 0
    batch: int = 1
    causal: bool = True
    format: str = "sbhd"
    documents: tuple[int, ...] = ()  # lengths; packed if given
    keep: float = 0.3
    gradients: str = "both"  # which outputs get gradients: "both", "out" or "lse"
    fused: bool = False  # q, k, v are views of one tensor, as in a fused projection's output
    dout_scale: float = 1.0  # scale of the output's gradient
    deterministic: bool = False  # torch.use_deterministic_algorithms, and equal gradients in two runs
    hopper_forward: bool = False  # fails if a Hopper GPU runs the portable forward
    # static masks for all sequences or for each; top-k lists for each head, or for the heads that share a KV head
    layout: Literal["static", "static batch", "top-k", "top-k shared"] = "static"
    steps: int = 0  # number of steps with new top-k lists; these must not wait, compile or leak anything
    portable: bool = False  # the portable kernels on every GPU
    sink: bool = False  # every query keeps the first block
    split: bool = False  # split long columns over programs
    # > 0: every head keeps a window of 512 keys and every n-th block, head h from an offset of h
    stripes: int = 0
    oracle_rows: int = 0  # > 0: so many rows of the oracle at a time, to save memory


@dataclass(frozen=True)
class Timing:
    """A timing with local window and vertical stride.

    Head h has offset h mod V. Tensors are bfloat16, with batch 1 and head dimension 128.
    """

    name: str
    length: int
    kv_heads: int
    block: int
    local: int
    stride: int
    heads: int = 32
    dim: int = 128


def _cases() -> list[Case]:
    return [
        *_general_cases(),
        *_hopper_cases(),
        *_uneven_cases(),
        *_one_pass_cases(),
        *_run_time_cases(),
        *_cases_of_128_queries(),
        *_split_cases(),
        *_second_pair_cases(),
        *_long_cases(),
        Case("packed, 200 documents, MQA, Hopper", documents=(3, 40, 0, 17, 5) * 40, kv_heads=1, hopper_forward=True),
        Case("GQA 16/4 block 64, 3000 rows", heads=16, kv_heads=4, s_q=3000, keep=0.2),
        Case("large gradients, float16", dtype="float16", block=128, dout_scale=100.0),
        Case("deterministic", deterministic=True, block=128),
        Case("aligned offset beyond keys", query_offset=384, s_k=250),
        Case("3 of 33 blocks, MQA", keep=0.1, block=128, s_q=4200, kv_heads=1),
    ]


def _general_cases() -> list[Case]:
    cases = [
        Case(f"{dtype} block {block} d {dim}", dtype=dtype, block=block, dim=dim)
        for dtype, block, dim in (
            ("bfloat16", 16, 128),
            ("bfloat16", 32, 128),
            ("bfloat16", 64, 128),
            ("bfloat16", 128, 128),
            ("bfloat16", 256, 128),
            ("bfloat16", 64, 64),
            ("bfloat16", 128, 64),
            ("bfloat16", 64, 80),
            ("bfloat16", 128, 96),
            ("bfloat16", 64, 256),
            ("bfloat16", 128, 256),
            ("bfloat16", 32, 256),
            ("bfloat16", 16, 64),
            ("float16", 64, 128),
            ("float16", 128, 128),
            ("float32", 64, 128),
            ("float32", 128, 64),
            ("float32", 16, 80),
            ("float32", 256, 256),
        )
    ]
    cases += [Case(f"{f} batch 3 block 128", format=f, batch=3, block=128) for f in ("sbhd", "bshd", "bhsd")]
    cases += [Case(f"length {s} block {b}", s_q=s, block=b) for s in (1, 63, 2049) for b in (64, 128)]
    cases += [
        Case("MHA block 128", kv_heads=8, block=128),
        Case("MHA block 64", kv_heads=8),
        Case("MQA block 128", kv_heads=1, block=128),
        Case("offset 777 block 128", query_offset=777, block=128),
        Case("offset 512 block 64", query_offset=512, s_q=512),
        Case("offset beyond keys", query_offset=300, s_k=250),
        Case("not causal, odd lengths", causal=False, s_q=700, s_k=901, block=128),
        Case("packed block 64", documents=(37, 0, 500, 1, 462)),
        Case("packed block 128", documents=(128, 700, 172), block=128),
        Case("packed not causal", documents=(37, 500, 463), causal=False),
        Case("mostly empty rows", keep=0.05, block=32),
        Case("d 128, v 64", v_dim=64),
    ]
    return cases


def _hopper_cases() -> list[Case]:
    """Hopper's kernels where available: features that general cases don't cover."""
    cases = []
    for block in (64, 128, 256):
        name = f"block {block}"
        cases += [
            Case(f"float16 {name} d 64", dtype="float16", block=block, dim=64),
            Case(f"offset 333, {name}, batch 2", query_offset=333, batch=2, block=block, s_q=700),
            Case(f"not causal, {name}, more keys", causal=False, s_q=333, s_k=1200, block=block),
            Case(f"not causal, {name}, fewer keys", causal=False, s_q=1200, s_k=333, block=block, query_offset=65),
            Case(f"causal, {name}, fewer keys than rows", s_q=1000, s_k=500, block=block),
            Case(f"mostly empty rows, {name}", keep=0.05, block=block, s_q=2000),
            Case(f"all kept, {name}, d 96", keep=1.0, block=block, dim=96, s_q=1025),
            Case(f"bhsd, {name}, MQA, batch 3", format="bhsd", kv_heads=1, batch=3, block=block, s_q=257),
            Case(f"offset 256, {name}, batch 2", query_offset=256, batch=2, block=block, s_q=700),
            Case(
                f"offset 301, {name}, more keys, bshd", query_offset=301, s_k=1100, block=block, s_q=700, format="bshd"
            ),
            Case(
                f"not causal, {name}, offset 128, fewer keys",
                causal=False,
                s_q=900,
                s_k=333,
                block=block,
                query_offset=128,
            ),
            Case(f"all kept, {name}", keep=1.0, block=block, s_q=1025),
            Case(f"gradient of out alone, {name}", gradients="out", block=block),
            Case(f"gradient of lse alone, {name}", gradients="lse", block=block),
            Case(f"fused q, k, v, {name}", fused=True, kv_heads=8, batch=2, block=block),
        ]
    return cases


def _uneven_cases() -> list[Case]:
    """Tiles that start before the first row, or reach another document."""
    cases = []
    uneven = (0, 300, 1, 0, 129, 128, 64, 400, 127, 0)
    for block in (64, 128, 256):
        for offset in (1, 65, 300, 777):
            name = f"offset {offset}, block {block}, Hopper"
            cases.append(Case(name, query_offset=offset, block=block, s_q=515, batch=2, hopper_forward=True))
        for dim in (64, 128):
            name = f"packed, uneven, block {block}, d {dim}, Hopper"
            cases.append(Case(name, documents=uneven, block=block, dim=dim, hopper_forward=True))
        cases += [
            Case(f"offset 65, block {block}, d 64, bhsd, Hopper", query_offset=65, block=block, dim=64, s_q=63,
                 format="bhsd", hopper_forward=True),
            Case(f"not causal, offset 300, block {block}, Hopper", query_offset=300, block=block, s_k=333, s_q=700,
                 causal=False, hopper_forward=True),
            Case(f"packed, one token each, block {block}, Hopper", documents=(1,) * 70, block=block,
                 keep=1.0, hopper_forward=True),
            Case(f"packed, MHA, bhsd, block {block}, Hopper", documents=(700, 200, 612), kv_heads=8, format="bhsd",
                 block=block, hopper_forward=True),
            Case(f"packed, float16, d 80, all kept, block {block}, Hopper", documents=uneven, dtype="float16", dim=80,
                 keep=1.0, block=block, hopper_forward=True),
        ]  # fmt: skip
    return cases


def _one_pass_cases() -> list[Case]:
    """The one-pass backward: its dtypes, dimensions and documents."""
    cases = []
    for block in (64, 128, 256):
        name = f"block {block}"
        cases += [
            Case(f"{dtype} {name} d {dim}, {kind}", dtype=dtype, dim=dim, block=block, **options)
            for dtype, dim in (("bfloat16", 64), ("bfloat16", 128), ("float16", 64), ("float16", 128))
            for kind, options in (
                ("MHA, 1500 rows", {"kv_heads": 8, "s_q": 1500}),
                ("batch 2, offset 301, bshd", {"batch": 2, "query_offset": 301, "s_q": 700, "format": "bshd"}),
                ("packed", {"documents": (37, 0, 700, 1, 333, 129)}),
            )
        ]
        cases += [
            Case(f"packed MHA, {name}", kv_heads=8, documents=(64, 1, 0, 1200, 63, 65), block=block),
            Case(
                f"packed MQA, {name}, mostly empty rows", kv_heads=1, documents=(1000, 0, 1, 513), keep=0.1, block=block
            ),
            Case(f"packed bhsd, {name}", documents=(0, 999), format="bhsd", block=block),
            Case(f"packed, gradient of lse alone, {name}", documents=(300, 5, 400), gradients="lse", block=block),
            Case(f"packed, one token each, {name}", documents=(1,) * 70, block=block),
            Case(f"packed, fused q, k, v, {name}", documents=(450, 301), fused=True, kv_heads=8, block=block),
        ]
    return cases


def _run_time_cases() -> list[Case]:
    cases = []
    for block in (64, 128, 256):
        name = f"block {block}"
        cases += [
            Case(f"top-k, {name}", block=block, layout="top-k", hopper_forward=True, steps=1000),
            Case(f"top-k shared, {name}, batch 3", block=block, batch=3, layout="top-k shared", steps=1000),
            Case(f"top-k shared, {name}, 3001 rows", block=block, s_q=3001, layout="top-k shared", keep=0.1),
            Case(f"top-k, {name}, mostly empty rows", block=block, s_q=2000, layout="top-k", keep=0.05),
            Case(f"top-k shared, {name}, all kept, d 64", block=block, dim=64, layout="top-k shared", keep=1.0),
            Case(f"top-k, {name}, not causal", block=block, s_q=333, s_k=1200, layout="top-k", causal=False),
            Case(f"top-k shared, {name}, offset 301, bshd", block=block, s_q=700, query_offset=301, batch=2,
                 format="bshd", layout="top-k shared"),
            Case(f"top-k, {name}, gradient of lse alone", block=block, gradients="lse", layout="top-k"),
            Case(f"top-k, {name}, MHA, fewer keys than rows", block=block, kv_heads=8, s_k=500, layout="top-k"),
            Case(f"masks of each sequence, {name}", block=block, batch=3, layout="static batch", hopper_forward=True),
            Case(f"top-k shared, {name}, portable", block=block, layout="top-k shared", portable=True, steps=1000),
            Case(f"masks of each sequence, {name}, portable", block=block, batch=2, layout="static batch",
                 portable=True),
        ]  # fmt: skip
    return [
        *cases,
        Case("top-k, block 32", block=32, layout="top-k", steps=100),
        Case("top-k, deterministic", block=128, layout="top-k", deterministic=True),
        Case("top-k shared, float16, MQA", block=64, dtype="float16", kv_heads=1, layout="top-k shared"),
    ]


def _cases_of_128_queries() -> list[Case]:
    """Return cases whose backward has steps of 128 queries."""
    cases = []
    for block in (128, 256):
        name = f"128 queries, block {block}"
        plain = Case(name, block=block, dim=64, s_q=2049)
        cases += [
            plain,
            replace(plain, name=f"{name}, float16", dtype="float16"),
            replace(plain, name=f"{name}, MHA, 63 rows", kv_heads=8, s_q=63),
            replace(
                plain, name=f"{name}, batch 2, offset 301, bshd", batch=2, query_offset=301, s_q=700, format="bshd"
            ),
            replace(plain, name=f"{name}, offset 128, bhsd", query_offset=128, s_q=513, format="bhsd"),
            replace(plain, name=f"{name}, more keys, not causal", s_q=333, s_k=1200, causal=False),
            replace(plain, name=f"{name}, fewer keys, not causal", s_q=1200, s_k=333, query_offset=65, causal=False),
            replace(plain, name=f"{name}, fewer keys than rows", s_q=1000, s_k=500),
            replace(plain, name=f"{name}, mostly empty rows", keep=0.05),
            replace(
                plain, name=f"{name}, all kept, fused q, k, v", keep=1.0, fused=True, kv_heads=8, batch=2, s_q=1025
            ),
            replace(plain, name=f"{name}, gradient of lse alone", gradients="lse"),
            replace(plain, name=f"{name}, masks of each sequence", batch=3, layout="static batch", s_q=900),
            replace(plain, name=f"{name}, split", heads=4, kv_heads=1, s_q=6001, keep=0.03, sink=True, split=True),
        ]
    return [
        *cases,
        replace(plain, name="128 queries, equal in two runs (portable)", deterministic=True),
        replace(plain, name="128 queries, large gradients, float16", dtype="float16", dout_scale=100.0),
    ]


def _long_cases() -> list[Case]:
    """Return cases whose backward orders its programs by query head.

    A KV head's members have more than 262,144 rows of queries.
    """
    name = "by query head, block 128"
    plain = Case(name, heads=32, kv_heads=4, block=128, s_q=32801, keep=0.0, stripes=32, oracle_rows=64)
    second = replace(plain, name="by query head, second pairs", block=64)
    fewer = replace(plain, heads=16, kv_heads=1, s_q=16401, oracle_rows=256)
    return [
        plain,
        second,
        replace(second, name="by query head, second pairs, float16, d 64", dtype="float16", dim=64),
        replace(fewer, name=f"{name}, MQA, float16, offset 301", dtype="float16", query_offset=301),
        replace(fewer, name=f"{name}, MQA, 128 queries", dim=64),
        replace(fewer, name=f"{name}, MQA, batch 2, bshd", batch=2, format="bshd"),
        replace(plain, name=f"{name}, split", sink=True, split=True),
        replace(fewer, name=f"{name}, MQA, fewer keys than rows", s_k=3001),
        replace(fewer, name=f"{name}, MQA, equal in two runs (portable)", s_k=3001, deterministic=True),
    ]


def _split_cases() -> list[Case]:
    """Return cases whose first column has several programs.

    The column has 6,000 rows or more of each member.
    """
    cases = []
    for block in (64, 128, 256):
        name = f"split, block {block}"
        sink = Case(name, block=block, s_q=6001, heads=4, kv_heads=1, keep=0.03, sink=True, split=True)
        lists = replace(sink, layout="top-k shared")
        cases += [
            sink,
            replace(sink, name=f"{name}, portable", portable=True),
            replace(lists, name=f"{name}, top-k shared", steps=300),
            replace(lists, name=f"{name}, top-k shared, portable", portable=True, steps=300),
            replace(lists, name=f"{name}, top-k, float16, d 64", dtype="float16", dim=64, layout="top-k"),
        ]
    return [
        *cases,
        replace(sink, name="split, batch 2, offset 333", batch=2, query_offset=333),
        replace(sink, name="split, masks of each sequence", batch=2, layout="static batch"),
        replace(sink, name="split, not causal, fewer keys", causal=False, s_k=1001),
        replace(sink, name="split, gradient of lse alone", gradients="lse"),
        replace(sink, name="split, equal in two runs", deterministic=True),
        replace(sink, name="split, float32, portable", dtype="float32", dim=80, portable=True),
        replace(lists, name="split, top-k, equal in two runs", deterministic=True),
        replace(sink, name="split, packed", documents=(5000, 1, 1000)),
    ]


def _second_pair_cases() -> list[Case]:
    """Return cases in which key tiles have second partners in the backward."""
    name = "second pairs, 32/8 heads"
    plain = Case(name, heads=32, kv_heads=8, s_q=2049, keep=0.02, stripes=8)
    fewer = replace(plain, heads=8, kv_heads=2)
    return [
        plain,
        replace(plain, name=f"{name}, float16", dtype="float16"),
        replace(plain, name=f"{name}, d 64", dim=64),
        replace(plain, name=f"{name}, split, none is cut", split=True),
        replace(fewer, name="second pairs, float16, d 64", dtype="float16", dim=64),
        replace(fewer, name="second pairs, MQA, 3001 rows", kv_heads=1, s_q=3001),
        replace(fewer, name="second pairs, random blocks", stripes=0, keep=0.3, s_q=3000),
        replace(fewer, name="second pairs, mostly empty rows", stripes=0, keep=0.1, kv_heads=1, s_q=4001),
        replace(fewer, name="second pairs, batch 2, offset 301, bshd", batch=2, query_offset=301, format="bshd"),
        replace(fewer, name="second pairs, offset 65, more keys, bhsd", query_offset=65, s_k=2500, format="bhsd"),
        replace(fewer, name="second pairs, not causal, fewer keys", s_k=1301, causal=False),
        replace(fewer, name="second pairs, masks of each sequence", batch=3, layout="static batch", keep=0.2),
        replace(fewer, name="second pairs, gradient of lse alone", gradients="lse"),
        replace(fewer, name="second pairs, large gradients, float16", dtype="float16", dout_scale=100.0),
        replace(fewer, name="second pairs, equal in two runs (portable)", deterministic=True),
        replace(
            fewer, name="second pairs, split, one column is cut", heads=4, kv_heads=1, s_q=6001, sink=True, split=True
        ),
    ]


CASES = {case.name: case for case in _cases()}
_QUICK = (
    "bfloat16 block 64 d 128", "bfloat16 block 128 d 128", "bfloat16 block 16 d 128", "float32 block 64 d 128",
    "length 2049 block 128", "offset 777 block 128", "offset 256, block 128, batch 2", "deterministic",
    "packed block 64", "bfloat16 block 64 d 80", "bfloat16 block 128 d 64, packed",
    "float16 block 64 d 128, MHA, 1500 rows", "offset 65, block 128, Hopper",
    "second pairs, 32/8 heads",
    "top-k, block 128", "top-k shared, block 64, batch 3", "masks of each sequence, block 128",
    "128 queries, block 128",
    "packed, uneven, block 64, d 128, Hopper", "packed, uneven, block 128, d 64, Hopper",
)  # fmt: skip

TIMINGS = [
    Timing(f"{length // 1024}k {heads} B={block} L={local} V=16", length, kv_heads, block, local, 16)
    for length in (8192, 32768)
    for heads, kv_heads in (("32/32", 32), ("32/8", 8))
    for block, local in ((128, 8), (64, 16))
]
QUICK_TIMINGS = TIMINGS[:4]


def case_names(quick: bool, only: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return names of all or a few cases.

    With `only`, return those that contain one of its words.
    """
    names = _QUICK if quick else tuple(CASES)
    return names if only is None else tuple(name for name in names if any(word in name for word in only))
