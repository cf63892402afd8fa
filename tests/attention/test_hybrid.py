import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2train.attention.hybrid import parse_layers
from s2train.errors import ConfigError
from s2train.layouts.patterns import Dense, LocalVertical
from tests.layouts.layout_cases import make_hybrid, mask_of


@pytest.mark.parametrize(
    ("text", "num_layers", "expected"),
    [
        ("DSSS", 4, "DSSS"),
        ("DSSS", 8, "DSSSDSSS"),
        ("S", 3, "SSS"),
        ("D1S3x8", 32, "DSSS" * 8),
        ("DDS30", 32, "DD" + "S" * 30),
        ("DD-S3D1x7-DD", 32, "DD" + "SSSD" * 7 + "DD"),
        ("D-Sx3", 8, "DSSSDSSS"),
        ("S2Dx2-D3", 9, "SSDSSDDDD"),
    ],
)
def test_layer_strings(text: str, num_layers: int, expected: str) -> None:
    assert "".join(parse_layers(text, num_layers)) == expected


counts = st.integers(1, 4)
runs = st.tuples(st.sampled_from("DS"), st.one_of(st.none(), counts))
groups = st.tuples(st.lists(runs, min_size=1, max_size=4), st.one_of(st.none(), counts))


@given(st.lists(groups, min_size=1, max_size=4), counts)
def test_any_string_of_the_grammar_is_read(
    parts: list[tuple[list[tuple[str, int | None]], int | None]], tiles: int
) -> None:
    text = "-".join(
        "".join(f"{letter}{count or ''}" for letter, count in some) + (f"x{repeat}" if repeat else "")
        for some, repeat in parts
    )
    expected = "".join(
        "".join(letter * (count or 1) for letter, count in some) * (repeat or 1) for some, repeat in parts
    )
    assert "".join(parse_layers(text, len(expected) * tiles)) == expected * tiles


@pytest.mark.parametrize(
    ("text", "telling"),
    [
        ("DSXS", "unknown letter X.*D \\(dense\\), S \\(s2\\). Declare X in layout.patterns or layout.kinds"),
        ("dsss", "unknown letter d.* Write D."),
        ("SSSSS", "5 layers.*the model's 32.*1, 2, 4, 8, 16, 32"),
        ("D1S3x16", "64 layers.*the model's 32"),
        ("S999999999999", "999999999999 layers"),
        ("S*3,D", "can't read"),
        ("DxS", "can't read"),
        ("x4", "can't read"),
        ("3S", "can't read"),
        ("Dx2x2", "can't read"),
        ("", "empty"),
        ("D--S", "empty"),
        ("S0D", "count of 0"),
        ("Sx0", "count of 0"),
    ],
)
def test_a_string_that_cannot_be_is_rejected(text: str, telling: str) -> None:
    with pytest.raises(ConfigError, match=f"^layout.layers=.*{telling}"):
        parse_layers(text, 32)


def test_each_letter_gives_its_layer_the_patterns_of_its_kind() -> None:
    dense, sparse = make_hybrid("DS", num_layers=2, num_heads=4, local=3, stride=4, sinks=1).layers
    assert dense.is_dense
    assert dense.heads == (Dense(),) * 4
    assert not sparse.is_dense
    assert sparse.heads == tuple(LocalVertical(3, 4, offset, 1) for offset in range(4))


def test_rotating_offsets_go_on_over_sparse_layers_and_skip_dense_ones() -> None:
    layers = make_hybrid("SDS", num_layers=3, num_heads=2, kind="rotating", stride=8).layers
    first, second = ([head.describe() for head in layers[number].heads] for number in (0, 2))
    assert [text[-8:] for text in first + second] == ["offset 0", "offset 1", "offset 2", "offset 3"]


@pytest.mark.parametrize("seq_length", [1, 16, 160, 161, 175])
def test_the_block_layout_has_every_heads_mask_up_to_a_partial_block(seq_length: int) -> None:
    layer = make_hybrid("S", num_layers=1, num_heads=6, stride=4).layers[0]
    layout = layer.block_layout(seq_length)
    num_blocks = -(-seq_length // 16)
    assert layout.block_size == 16
    assert torch.equal(layout.mask(), torch.stack([mask_of(head, num_blocks) for head in layer.heads]))


def test_a_slice_of_heads_has_their_masks_alone() -> None:
    layer = make_hybrid("S", num_layers=1, num_heads=8, stride=8).layers[0]
    assert torch.equal(layer.block_layout(320, heads=slice(2, 5)).mask(), layer.block_layout(320).mask()[2:5])


@pytest.mark.parametrize(
    ("setting", "change"),
    [
        ("model.num_query_groups", {"num_query_groups": 3}),
        ("layout.block_size", {"block_size": 48}),
        ("layout.pattern.local", {"local": 0}),
        ("layout.pattern.stride", {"stride": 0}),
        ("schedule.kind", {"kind": "none"}),
    ],
)
def test_a_layout_that_cannot_be_is_rejected_by_its_setting(setting: str, change: dict) -> None:
    with pytest.raises(ConfigError, match=f"^{setting}="):
        make_hybrid("DS", num_layers=2, num_heads=4, **change)
