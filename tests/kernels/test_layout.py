"""What a BlockLayout stores."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from s2train.kernels import BlockLayout
from s2train.kernels import layout_builder as layout_lines
from s2train.kernels.benchmarks.layout_cost import main, peak_bytes
from s2train.kernels.decode.schedule import decode_schedule
from s2train.kernels.layout_builder import ColumnRule, Rule


def tensors(layout: BlockLayout) -> list[torch.Tensor]:
    return [value for value in vars(layout).values() if isinstance(value, torch.Tensor)]


def random_mask(*shape: int) -> torch.Tensor:
    return torch.rand(*shape) < 0.5


def test_mask_comes_back() -> None:
    mask = random_mask(5, 7, 4)
    assert BlockLayout.from_mask(mask, 64).mask().equal(mask)


def test_rows_and_columns_are_ascending_and_say_the_same() -> None:
    mask = random_mask(1, 6, 9)
    layout = BlockLayout.from_mask(mask, 64)
    for i in range(6):
        row = layout.row_columns[layout.row_offsets[i] : layout.row_offsets[i + 1]]
        assert row.tolist() == mask[0, i].nonzero().flatten().tolist()
    for j in range(9):
        column = layout.column_rows[layout.column_offsets[j] : layout.column_offsets[j + 1]]
        assert column.tolist() == mask[0, :, j].nonzero().flatten().tolist()


def test_equal_heads_are_stored_once() -> None:
    a, b = torch.eye(4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)
    layout = BlockLayout.from_mask(torch.stack([a, b, a, a]), 64)
    assert layout.pattern_of_head.tolist() == [[0, 1, 0, 0]]
    assert layout.row_columns.numel() == 4 + 16
    assert layout.nbytes < BlockLayout.from_mask(torch.stack([a, b, b.triu(), a]), 64).nbytes


def test_patterns_and_masks_build_the_same() -> None:
    masks = random_mask(2, 5, 5)
    layout = BlockLayout.from_patterns(masks, [1, 0, 1], 128)
    assert layout.mask().equal(masks[[1, 0, 1]])
    assert layout.num_heads == 3


def test_heads_slices_share_storage() -> None:
    mask = random_mask(6, 5, 5)
    layout = BlockLayout.from_mask(mask, 64)
    part = layout.heads(2, 5)
    assert part.mask().equal(mask[2:5])
    assert part.row_columns is layout.row_columns


def test_index_tensors_are_int32() -> None:
    layout = BlockLayout.from_mask(random_mask(2, 3, 3), 16)
    assert {t.dtype for t in tensors(layout)} == {torch.int32}


def test_columns_by_work_starts_with_the_longest() -> None:
    # two KV heads of two query heads each; columns kept 4 + 4, 1 + 0 and 0 + 0, 3 + 1 times
    mask = torch.zeros(4, 4, 2, dtype=torch.bool)
    mask[0, :, 0] = mask[1, :, 0] = True
    mask[0, 0, 1] = True
    mask[2, :3, 1] = mask[3, 0, 1] = True
    order = BlockLayout.from_mask(mask, 64).columns_by_work(2)
    assert order.tolist() == [0, 3, 1, 2]


@pytest.mark.parametrize("block_size", [0, 8, 48, 512])
def test_unsupported_block_sizes_are_rejected(block_size: int) -> None:
    with pytest.raises(ValueError, match="block_size"):
        BlockLayout.from_mask(random_mask(1, 2, 2), block_size)


@pytest.mark.parametrize("mask", [torch.ones(1, 2, 2), torch.ones(2, 2) > 0, torch.ones(0, 2, 2) > 0])
def test_masks_of_other_dtypes_and_ranks_are_rejected(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="mask"):
        BlockLayout.from_mask(mask, 64)


@pytest.mark.parametrize("heads", [[], [2], [-1]])
def test_patterns_that_do_not_exist_are_rejected(heads: list[int]) -> None:
    with pytest.raises(ValueError, match="pattern_of_head"):
        BlockLayout.from_patterns(random_mask(2, 3, 3), heads, 64)


# layouts whose sequences differ
def test_masks_of_each_sequence_come_back() -> None:
    mask = torch.rand(3, 4, 5, 6) < 0.5
    layout = BlockLayout.from_mask(mask, 64)
    assert (layout.batch_size, layout.num_heads) == (3, 4)
    assert layout.mask().equal(mask)
    assert layout.heads(1, 3).mask().equal(mask[:, 1:3])


def test_equal_heads_of_different_sequences_are_stored_once() -> None:
    mask = random_mask(2, 4, 4)
    layout = BlockLayout.from_mask(torch.stack([mask, mask.flip(0)]), 64)
    assert layout.pattern_of_head.tolist() == [[0, 1], [1, 0]]


def test_columns_by_work_numbers_key_blocks_by_sequence_too() -> None:
    mask = torch.zeros(2, 2, 3, 2, dtype=torch.bool)
    mask[1, 1, :, 1] = True  # number (1 * 2 + 1) * 2 + 1
    mask[0, 1, 0, 0] = True  # number (0 * 2 + 1) * 2
    assert BlockLayout.from_mask(mask, 64).columns_by_work(2).tolist()[:2] == [7, 2]


def test_decoding_takes_one_layout_for_all_sequences() -> None:
    layout = BlockLayout.from_mask(torch.stack([random_mask(2, 4, 4), random_mask(2, 4, 4)]), 64)
    with pytest.raises(ValueError, match="one layout for all sequences"):
        decode_schedule(layout, 2)


def test_patterns_may_be_numpys_integers() -> None:
    masks = random_mask(2, 3, 3)
    layout = BlockLayout.from_patterns(masks, np.array([1, 0, 1]), 64)
    assert torch.equal(layout.mask(), masks[[1, 0, 1]])


@pytest.mark.parametrize("heads", [[[0, 1], [0]], [[]], [[0], [2]], [0, [1, 1]]])
def test_patterns_of_sequences_that_do_not_fit_are_rejected(heads: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="pattern_of_head"):
        BlockLayout.from_patterns(random_mask(2, 3, 3), heads, 64)


# rules
def stored(mask: torch.Tensor) -> dict[str, list[int]]:
    """What a layout of patterns [P, n_q, n_k] stores, spelled out with lists."""
    rows = [row.nonzero().flatten().tolist() for row in mask.flatten(0, 1)]
    columns = [column.nonzero().flatten().tolist() for column in mask.mT.flatten(0, 1)]
    return {
        "row_offsets": list(itertools.accumulate(map(len, rows), initial=0)),
        "row_columns": list(itertools.chain(*rows)),
        "column_offsets": list(itertools.accumulate(map(len, columns), initial=0)),
        "column_rows": list(itertools.chain(*columns)),
    }


def assert_stores(layout: BlockLayout, mask: torch.Tensor) -> None:
    assert {name: getattr(layout, name).tolist() for name in stored(mask)} == stored(mask)


def rule_of(mask: torch.Tensor) -> Rule:
    return lambda query, key: mask[query, key]


def spelled_out(rule: Rule, num_query_blocks: int, num_key_blocks: int) -> torch.Tensor:
    return rule(torch.arange(num_query_blocks)[:, None], torch.arange(num_key_blocks)[None, :])


@pytest.fixture(params=[None, 1, 7])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one line, of a few pairs, or as large as they are."""
    if request.param is not None:
        monkeypatch.setattr(layout_lines, "_PAIRS_AT_ONCE", request.param * 5)
        monkeypatch.setattr(layout_lines, "_KEPT_AT_ONCE", request.param)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(("patterns", "n_q", "n_k"), [(1, 1, 1), (1, 13, 13), (3, 5, 17), (2, 19, 4)])
def test_rules_store_what_they_keep_in_pieces_of_any_size(patterns: int, n_q: int, n_k: int) -> None:
    mask = random_mask(patterns, n_q, n_k)
    layout = BlockLayout.from_rule([rule_of(m) for m in mask], [*range(patterns), 0], 64, n_q, n_k, device="cpu")
    assert_stores(layout, mask)
    assert layout.mask().equal(mask[[*range(patterns), 0]])


@pytest.mark.usefixtures("at_once")
def test_lines_may_keep_nothing() -> None:
    mask = random_mask(2, 9, 7)
    mask[0, :3] = mask[0, -1] = False
    mask[1, :, 2:4] = mask[1, :, -1] = False
    assert_stores(BlockLayout.from_patterns(mask, [0, 1], 64), mask)
    nothing = torch.zeros(1, 3, 4, dtype=torch.bool)
    assert_stores(BlockLayout.from_patterns(nothing, [0], 64), nothing)


@given(
    n_q=st.integers(1, 40),
    n_k=st.integers(1, 40),
    rules=st.lists(st.tuples(st.integers(1, 50), st.lists(st.booleans(), min_size=40, max_size=40)), min_size=1),
    kept_at_once=st.integers(1, 2000),
)
def test_column_rules_store_what_their_pairs_say(
    n_q: int, n_k: int, rules: list[tuple[int, list[bool]]], kept_at_once: int
) -> None:
    built = [ColumnRule(local, torch.tensor(columns).__getitem__) for local, columns in rules]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_lines, "_KEPT_AT_ONCE", kept_at_once)
        layout = BlockLayout.from_rule(built, range(len(built)), 16, n_q, n_k, device="cpu")
    assert_stores(layout, torch.stack([spelled_out(rule, n_q, n_k) for rule in built]))


def test_rules_of_both_kinds_mix() -> None:
    rules = [ColumnRule(2, lambda key: key % 3 == 0), lambda query, key: query <= key]
    layout = BlockLayout.from_rule(rules, [1, 0, 1], 16, 8, 8, device="cpu")
    assert layout.mask().equal(torch.stack([spelled_out(rules[p], 8, 8) for p in (1, 0, 1)]))


def test_a_rule_may_ignore_one_of_its_arguments() -> None:
    layout = BlockLayout.from_rule([lambda query, key: key % 2 == 0], [0], 16, 3, 5, device="cpu")
    assert layout.mask()[0].tolist() == [[True, False, True, False, True]] * 3


def test_a_layout_is_built_on_its_device(device: torch.device) -> None:
    seen = set()

    def rule(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen.update({query.device.type, key.device.type, query.dtype, key.dtype})
        return query >= key

    for each in (rule, ColumnRule(3, lambda key: key < 2)):
        layout = BlockLayout.from_rule([each], [0], 64, 6, 6, device=device)
        assert {(t.device.type, t.dtype) for t in tensors(layout)} == {(device.type, torch.int32)}
    assert seen == {device.type, torch.int64}


@pytest.mark.parametrize("closed", [False, True], ids=["pairs", "columns"])
def test_scratch_memory_has_a_bound_however_many_pairs(closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, kept, n = 1 << 16, 1 << 12, 1000
    monkeypatch.setattr(layout_lines, "_PAIRS_AT_ONCE", pairs)
    monkeypatch.setattr(layout_lines, "_KEPT_AT_ONCE", kept)
    columns = ColumnRule(8, lambda key: key % 8 == 3)
    # the pairwise rule's own int64 temporary is the 16 bytes a pair that the bound allows for
    rule: Rule = columns if closed else lambda query, key: ((query - key) % 8 == 3) & (query >= key)

    def build() -> BlockLayout:
        return BlockLayout.from_rule([rule] * 4, [0, 1, 2, 3], 64, n, n, device="cpu")

    peak = peak_bytes(build, torch.device("cpu"))
    lines = 64 * 4 * n  # counts and offsets: a few numbers for each line, none for each pair
    assert peak < build().nbytes + lines + (56 * (kept + n) if closed else 18 * pairs)


def test_too_many_kept_blocks_are_rejected_before_they_are_stored() -> None:
    every = ColumnRule(1, lambda key: torch.ones_like(key, dtype=torch.bool))
    n = 1 << 16  # n (n + 1) / 2 is just above 2^31

    def build() -> None:
        with pytest.raises(ValueError, match=r"2147516416 kept blocks are too many .* larger blocks"):
            BlockLayout.from_rule([every], [0], 16, n, n, device="cpu")

    assert peak_bytes(build, torch.device("cpu")) < 100 * n


def test_rules_that_change_their_mind_are_rejected() -> None:
    rules = [
        lambda query, key: torch.rand(torch.broadcast_shapes(query.shape, key.shape)) < 0.5,  # between two calls
        lambda query, key: (query >= key) if query.shape[1] == 1 else (query > key),  # between rows and columns
    ]
    for rule in rules:
        with pytest.raises(ValueError, match="a rule must keep the same pairs"):
            BlockLayout.from_rule([rule], [0], 16, 50, 50, device="cpu")


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        ({"rules": []}, "0 rules"),
        ({"num_query_blocks": 0}, "0 query blocks"),
        ({"num_key_blocks": 0}, "0 key blocks"),
        ({"block_size": 48}, "block_size"),
        ({"pattern_of_head": [1]}, "pattern_of_head"),
        ({"rules": [lambda query, key: query - key]}, "bool"),
    ],
)
def test_rules_that_make_no_layout_are_rejected(change: dict[str, Any], telling: str) -> None:
    fine = {
        "rules": [lambda query, key: query >= key],
        "pattern_of_head": [0],
        "block_size": 64,
        "num_query_blocks": 2,
        "num_key_blocks": 2,
    }
    assert BlockLayout.from_rule(**fine, device="cpu").num_heads == 1
    with pytest.raises(ValueError, match=telling):
        BlockLayout.from_rule(**(fine | change), device="cpu")


def test_the_cost_program_compares_layouts_and_writes_what_they_took(tmp_path: Path) -> None:
    output = tmp_path / "cost.json"
    assert main(["b64-l2-v4-1k-h4-kv2", "--repeats", "1", "--device", "cpu", "--output", str(output)]) == 0
    (record,) = json.loads(output.read_text())["cases"]
    assert set(record["builds"]) == {"columns", "pairs", "masks", "columns by work", "forward work", "key pairs"}
    assert record["differing"] == []
    assert all(cost["ms"] > 0 and cost["peak_bytes"] > 0 for cost in record["builds"].values())
    assert record["builds"]["columns"]["peak_bytes"] > record["nbytes"]
