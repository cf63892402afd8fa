"""Every division over ranks starts from the same weights at the same seed, without a checkpoint between them."""

from pathlib import Path

import pytest

from tests.program import UNSAVED, metrics, pretrain

pytestmark = [pytest.mark.slow]

TIED, UNTIED = "model.tie_embeddings=true", "model.tie_embeddings=false"
DIVISIONS = {
    "tp2": (2, ["parallel.tp=2", UNTIED]),
    "pp2": (2, ["parallel.pp=2", UNTIED]),
    "vpp2 tied": (2, ["parallel.pp=2", "parallel.vpp=2", TIED]),
    "pp3 split by cost": (3, ["parallel.pp=3", "parallel.pipeline_split=cost", UNTIED]),
    "tp2 pp2 tied": (4, ["parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true", TIED]),
}


def first_step(folder: Path, *settings: str, processes: int = 1) -> tuple[float, float]:
    """Loss and gradient norm before any update."""
    pretrain(folder, *settings, "train.steps=3", "train.exit_step=1", UNSAVED, processes=processes).succeeded()
    (record,) = metrics(folder)
    return record["loss"], record["grad_norm"]


@pytest.fixture(scope="module")
def of_one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, float]]:
    """With tied embeddings and without. Megatron itself draws these weights."""
    return {setting: first_step(tmp_path_factory.mktemp("one"), setting) for setting in (TIED, UNTIED)}


# pp2 draws as pp3 does, which divides otherwise.
@pytest.mark.parametrize(
    "division", [pytest.param(name, marks=pytest.mark.long if name == "pp2" else []) for name in DIVISIONS]
)
def test_a_division_starts_as_one_rank_does(
    division: str, of_one_rank: dict[str, tuple[float, float]], tmp_path: Path
) -> None:
    processes, settings = DIVISIONS[division]
    found = first_step(tmp_path, *settings, processes=processes)
    assert found == pytest.approx(of_one_rank[settings[-1]], rel=1e-5)
