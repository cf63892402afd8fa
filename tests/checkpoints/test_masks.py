"""A checkpoint is used with the masks that it was trained with, whatever its layout's file holds later."""

from pathlib import Path

import numpy as np
import pytest

from s2train.checkpoints.masks import check_masks, mask_digests
from s2train.errors import ConfigError
from s2train.layouts.patterns.file import write_masks
from s2train.planning import compose_run, hybrid_layout
from tests.program import SMALL, error_line, pretrain, run


def layout(file: Path) -> list[str]:
    return ["layout.layers=DSFS", f"+layout.patterns.F={{kind:file,file:{file}}}", "train.steps=3"]


def write(file: Path, window: int, layer: int = 2) -> None:
    """Write masks of four heads that see everything but blocks just beyond a window."""
    mask = np.tri(8, dtype=bool) & ~np.eye(8, k=-window, dtype=bool)
    write_masks(file, {layer: np.stack([mask] * 4)}, 16)


@pytest.mark.slow
def test_neither_a_resumed_run_nor_an_evaluation_takes_other_masks(tmp_path: Path) -> None:
    file, trained = tmp_path / "masks.npz", tmp_path / "run"
    write(file, 1)
    settings = [*layout(file), "layout.allow_partial_coverage=true"]
    pretrain(trained, *settings, "train.exit_step=1", processes=0).succeeded()
    write(file, 2)
    problem = f"iter_0000001: it was trained with other masks than {file} holds now"
    assert problem in error_line(pretrain(trained, *settings, processes=0))
    generated = run("generate.py", f"checkpoint={trained}", "prompt=a", "max_tokens=1", processes=0)
    assert problem in error_line(generated)


def test_masks_are_compared_by_the_layers_that_read_them(tmp_path: Path) -> None:
    file, checkpoint = tmp_path / "masks.npz", tmp_path / "iter_0000001"

    def now() -> dict[str, str]:
        return mask_digests(hybrid_layout(compose_run([*SMALL, *layout(file)])))

    write(file, 1)
    trained = now()
    assert trained.keys() == {str(file)}
    write(file, 1)  # the same masks, in a file of another time
    check_masks(trained, now(), checkpoint, "checkpoint")
    write(file, 2)
    check_masks({}, now(), checkpoint, "checkpoint")  # an earlier checkpoint
    with pytest.raises(ConfigError, match="other masks"):
        check_masks(trained, now(), checkpoint, "checkpoint")
