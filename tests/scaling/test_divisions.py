"""Divisions of four and eight GPUs use all of them, and results say so."""

from pathlib import Path
from typing import Any

import pytest

from s2train.planning import compose_run
from s2train.scaling.jobs import Runner
from s2train.scaling.parity import VARIANTS
from s2train.scaling.recorded import Recorded
from s2train.scaling.speed import DIVISIONS, Request, speed
from s2train.validation.division import check_division
from tests.scaling.fake_ranks import FakeRanks

PROFILE = {"event": "profile", "traced": [9], "step_ms": 10.0, "parts": {"linear layers": 10.0}}
RECORDS: list[dict[str, Any]] = [
    *({"step": step, "loss": 1.0, "tokens_per_s": 100.0, "step_time_s": 1.0} for step in range(1, 10)),
    PROFILE,
]


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, variants in VARIANTS.items() for name in variants])
def test_the_parity_model_can_be_divided_so(size: int, name: str) -> None:
    settings = VARIANTS[size][name]
    cfg = compose_run(["+model=125m_hybrid", "train.global_batch_size=8", "train.micro_batch_size=1", *settings])
    check_division(cfg, size)
    copies = size // (cfg.parallel.tp * cfg.parallel.pp * cfg.parallel.cp)
    assert (copies > 1) == ("dp" in name)


@pytest.mark.parametrize(
    ("size", "name"), [(size, name) for size, divisions in DIVISIONS.items() for name in divisions]
)
def test_a_division_is_named_by_what_it_divides(size: int, name: str) -> None:
    cfg = compose_run(["+model=1b_hybrid", *DIVISIONS[size][name][0]])
    parallel = cfg.parallel
    sizes = {"tp": parallel.tp, "cp": parallel.cp, "dp": size // (parallel.tp * parallel.cp)}
    assert name == " ".join(f"{kind}{count}" for kind, count in sizes.items() if count > 1)


def eight(folder: Path, ranks: FakeRanks) -> Runner:
    return Runner(folder / "runs", 8, Recorded(folder / "jobs.json"), ranks)


def test_speed_of_eight_gpus_measures_every_division_and_yields_after_each(tmp_path: Path) -> None:
    ranks = FakeRanks(RECORDS)
    found = list(speed(eight(tmp_path, ranks), Request(("1b_hybrid",), 4096, 2)))
    counts = [len(result["models"]["1b_hybrid"]) for result in found]
    assert counts == list(range(1, len(counts) + 1))
    rows = found[-1]["models"]["1b_hybrid"]
    assert list(rows) == ["one", *(name for divisions in DIVISIONS.values() for name in divisions)]
    assert rows["dp4"]["efficiency"] == 100 / (4 * 100)
    assert (rows["dp8"]["goal"], rows["tp4 dp2"]["goal"]) == (0.96, 0.85)
    batches = {
        name: next(word.partition("=")[2] for word in settings if word.startswith("train.global_batch_size"))
        for name, _, settings in ranks.started
    }
    assert (batches["1b_hybrid-one"], batches["1b_hybrid-dp8"], batches["1b_hybrid-tp4-dp2"]) == ("2", "16", "4")


def test_only_the_named_divisions_run_with_the_micro_batch(tmp_path: Path) -> None:
    ranks = FakeRanks(RECORDS)
    request = Request(("1b_hybrid",), 4096, 2, micro_batch=2, divisions=("one", "cp4"))
    *_, last = speed(eight(tmp_path, ranks), request)
    assert list(last["models"]["1b_hybrid"]) == ["one", "cp4"]
    assert [name for name, _, _ in ranks.started] == ["1b_hybrid-one", "1b_hybrid-cp4"]
    assert all("train.micro_batch_size=2" in settings for _, _, settings in ranks.started)
