"""Block selection under context parallelism trains as it does on one rank."""

from pathlib import Path
from typing import Any

import pytest

from tests.program import UNSAVED, metrics, pretrain

TOLERANCE = 1e-5  # of another division, in fp32
# Each scorer, both query sources, a gate, a loss that trains the trunk; sparse and dense steps.
KINDS = {
    "M": "scorer:moba,top_k:1,warm_up_steps:2",
    "I": "scorer:index,top_k:1,warm_up_steps:1,queries:first_token,trunk_gradient:true,loss_weight:100",
    "E": "scorer:sea,share:0.4,warm_up_steps:2,mix_mean:true,features:8,channels:4,loss_weight:100,mse_weight:100",
}
SETTINGS = ["model.num_layers=4", "layout.layers=DMIE", "train.steps=3", "train.seq_length=256", UNSAVED]
SETTINGS += [f"+layout.kinds.{letter}={{kind:block_selection,{own}}}" for letter, own in KINDS.items()]
NAMES = ("loss", "grad_norm", *(f"block_selection_{name}_by_layer" for name in ("kl", "mse", "recall")))


def values(run_dir: Path) -> list[Any]:
    return [[record[name] for name in NAMES] for record in metrics(run_dir)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("alone")
    pretrain(folder, *SETTINGS).succeeded()
    return values(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "division"),
    [
        (2, ["parallel.cp=2", "train.recompute=full"]),
        pytest.param(4, ["parallel.cp=4"], marks=pytest.mark.long),
        (4, ["parallel.cp=2", "parallel.tp=2", "parallel.sequence_parallel=true"]),
    ],
    ids=["two, recomputed", "four", "two of two tensor parallel ranks"],
)
def test_context_parallel_ranks_train_alike(
    alone: list[Any], processes: int, division: list[str], tmp_path: Path
) -> None:
    pretrain(tmp_path, *SETTINGS, *division, processes=processes).succeeded()
    found = values(tmp_path)
    assert len(found) == 3
    for now, expected in zip(found, alone, strict=True):
        for name, one, other in zip(NAMES, now, expected, strict=True):
            assert one == pytest.approx(other, rel=TOLERANCE, abs=1e-8), name


@pytest.mark.slow
def test_bfloat16_differs_by_rounding_alone(alone: list[Any], tmp_path: Path) -> None:
    pretrain(tmp_path, *SETTINGS, "parallel.cp=2", "train.precision=bf16", processes=2).succeeded()
    for now, expected in zip(values(tmp_path), alone, strict=True):
        for name, one, other in zip(NAMES, now, expected, strict=True):
            if name in ("loss", "grad_norm", "block_selection_recall_by_layer"):
                assert one == pytest.approx(other, rel=0.02), name
