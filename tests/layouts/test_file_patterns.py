"""Masks from an .npz file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from s2train.attention.coverage import coverage_report
from s2train.attention.hybrid import HybridLayout
from s2train.config import PatternConfig
from s2train.costs.attention import kept_positions
from s2train.errors import ConfigError
from s2train.layouts.patterns.file import write_masks
from tests.layouts.layout_cases import make_hybrid

HEADS, BLOCKS = 4, 37


def random_masks(heads: int = HEADS) -> np.ndarray:
    return np.tril(np.random.default_rng().random((heads, BLOCKS, BLOCKS)) < 0.3) | np.eye(BLOCKS, dtype=bool)


def hybrid_of(file: Path, **changes: Any) -> HybridLayout:
    pattern = PatternConfig("file", file=str(file))
    return make_hybrid("DSS", **{"num_layers": 3, "num_heads": HEADS, "pattern": pattern} | changes)


def test_each_layer_and_head_has_its_mask(tmp_path: Path) -> None:
    file, masks = tmp_path / "masks.npz", {1: random_masks(), 2: random_masks()}
    write_masks(file, masks, 16)
    hybrid = hybrid_of(file)
    for number, mask in masks.items():
        assert np.array_equal(hybrid.layers[number].block_layout(BLOCKS * 16).mask().numpy(), mask)
        assert np.array_equal(hybrid.layers[number].block_layout(9 * 16 - 3).mask().numpy(), mask[:, :9, :9])


def test_coverage_and_density_are_counted_from_the_masks(tmp_path: Path) -> None:
    file, masks = tmp_path / "masks.npz", {1: random_masks(), 2: random_masks()}
    write_masks(file, masks, 16)
    hybrid = hybrid_of(file)
    (run,) = coverage_report(hybrid, BLOCKS * 16).runs
    assert [layer.seen for layer in run.layers] == [int(mask.any(0).sum()) for mask in masks.values()]
    assert run.union.seen == int((masks[1] | masks[2]).any(0).sum())
    below = np.tril(masks[1], -1).sum((1, 2))
    assert kept_positions(hybrid.layers[1], BLOCKS * 16) == tuple(int(n) * 256 + BLOCKS * 136 for n in below)


def test_equal_masks_share_their_index_tensors(tmp_path: Path) -> None:
    file = tmp_path / "masks.npz"
    write_masks(file, {1: random_masks(1).repeat(HEADS, 0), 2: random_masks()}, 16)
    same, other = hybrid_of(file).layers[1:]
    assert len(set(same.heads)) == 1
    assert len(set(other.heads)) == HEADS


def test_a_longer_sequence_than_the_masks_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "masks.npz"
    write_masks(file, {1: random_masks(), 2: random_masks()}, 16)
    hybrid = hybrid_of(file)
    for use in (lambda length: coverage_report(hybrid, length), lambda length: hybrid.layers[1].block_layout(length)):
        with pytest.raises(ConfigError, match=r"^layout.pattern.file=.*masks.npz: .*37 blocks.* has 38"):
            use(BLOCKS * 16 + 1)


def future(masks: np.ndarray) -> np.ndarray:
    masks[2, 4, 7] = True
    return masks


def hole(masks: np.ndarray) -> np.ndarray:
    masks[3, 5, 5] = False
    return masks


@pytest.mark.parametrize(
    ("arrays", "telling"),
    [
        ({}, "no block_size"),
        ({"block_size": 16}, "no layer_1"),
        ({"block_size": 64, "layer_1": random_masks()}, "blocks of 64 tokens.* Set layout.block_size=64"),
        ({"block_size": 16, "layer_1": random_masks(3)}, r"has shape \[3, 37, 37\].* Save \[4 heads"),
        ({"block_size": 16, "layer_1": random_masks()[:, :-1]}, r"has shape \[4, 36, 37\]"),
        ({"block_size": 16, "layer_1": random_masks().astype(int)}, "is int64.* Save bool"),
        ({"block_size": 16, "layer_1": future(random_masks())}, "keeps key block 7 for query block 4 of head 2"),
        ({"block_size": 16, "layer_1": hole(random_masks())}, "drops query block 5's own key block in head 3"),
        ({"block_size": 16, "layer_1": np.array([{}])}, r"no \.npz of arrays"),
    ],
)
def test_a_file_that_does_not_fit_is_rejected(tmp_path: Path, arrays: dict[str, Any], telling: str) -> None:
    file = tmp_path / "masks.npz"
    np.savez(file, **arrays)
    with pytest.raises(ConfigError, match=rf"^layout.pattern.file=.*masks.npz: .*{telling}"):
        hybrid_of(file)


@pytest.mark.parametrize("content", [None, b"", b"no archive"])
def test_a_file_that_is_none_is_rejected(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "masks.npz"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"^layout.pattern.file=.*masks.npz: (there is no such|no \.npz).*write_masks"
    ):
        hybrid_of(file)


def test_a_file_whose_compressed_masks_are_garbled_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "masks.npz"
    write_masks(file, {1: random_masks(), 2: random_masks()}, 16)
    content = bytearray(file.read_bytes())
    start = content.index(b"layer_1.npy") + 100
    content[start : start + 200] = b"\xff" * 200
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^layout.pattern.file=.*masks.npz: no \.npz of arrays \(.*write_masks"):
        hybrid_of(file)


def test_a_letters_file_is_named_by_its_own_setting(tmp_path: Path) -> None:
    file = tmp_path / "masks.npz"
    write_masks(file, {2: random_masks()}, 16)
    hybrid = make_hybrid("DSF", num_layers=3, num_heads=HEADS, patterns={"F": {"kind": "file", "file": str(file)}})
    assert torch.equal(
        hybrid.layers[2].block_layout(320).mask()[0],
        hybrid.layers[2].heads[0].keep(*torch.meshgrid(torch.arange(20), torch.arange(20), indexing="ij")),
    )
    with pytest.raises(ConfigError, match=r"^layout.patterns.F.file="):
        hybrid.layers[2].block_layout(BLOCKS * 16 + 1)
