"""Weight decay leaves out gains, except in runs that earlier versions began."""

import json
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from tests.program import pretrain

# A step decays by a tenth, and Adam moves a weight by a thousandth.
SETTINGS = ("model=tiny_sea", "optim.lr=1e-3", "optim.weight_decay=100", "optim.decay_style=constant")
STEPS = ("train.steps=3", "optim.warmup_steps=0")


def sharpness(checkpoint: Path) -> float:
    """The mean of all layers, whose weights begin at 1."""
    sizes = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    names = [name for name in sizes if name.startswith("decoder.") and name.endswith(".sharpness")]
    found = {name: torch.zeros(sizes[name].size) for name in names}
    load(found, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    return float(torch.cat([weight.flatten() for weight in found.values()]).mean())


def test_a_gain_decays_only_in_a_run_that_began_so(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    pretrain(tmp_path, *SETTINGS, *STEPS, "train.exit_step=1", processes=0).succeeded()
    assert abs(sharpness(checkpoints / "iter_0000001") - 1) < 0.01
    progress = checkpoints / "iter_0000001" / "progress.json"
    earlier = json.loads(progress.read_text())
    assert earlier.pop("decays_gains") is False
    progress.write_text(json.dumps(earlier))
    pretrain(tmp_path, *SETTINGS, *STEPS, "train.exit_step=2", processes=0).succeeded()
    assert abs(sharpness(checkpoints / "iter_0000002") - 0.9) < 0.01
