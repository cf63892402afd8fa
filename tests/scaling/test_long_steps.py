"""Long steps have the most layers that fit, and a dense model is measured too where its steps are short."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from s2train.environment.hardware import Hardware, gpu_rates
from s2train.errors import ConfigError
from s2train.planning import compose_run, preview
from s2train.scaling.jobs import Runner
from s2train.scaling.long_steps import Request, long_steps
from s2train.scaling.recorded import Recorded
from tests.scaling.fake_ranks import FakeRanks

H200 = Hardware("NVIDIA H200", "cuda", 150_000_000_000, gpu_rates("NVIDIA H200"), (9, 0))
K = 1024
REQUEST = Request("7b", [512 * K, 128 * K], 64 * K, None, 60.0, [])
RECORDS: list[dict[str, Any]] = [
    {"step": step, "loss": 1.0 / step, "tokens_per_s": 100.0 * step, "step_time_s": 9.0 / step} for step in (1, 2, 3)
]


Measured = tuple[FakeRanks, list[dict[str, Any]]]
PEAK = {"event": "memory", "planned_gib": 7.0, "peak_gib": 6.5}


@pytest.fixture(scope="module", autouse=True)
def without_gpus() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def measure(
    folder: Path, request: Request, ranks: FakeRanks, devices: int = 4, timeout_s: float = 300
) -> list[dict[str, Any]]:
    runner = Runner(folder / "runs", devices, Recorded(folder / "jobs.json"), ranks, request.settings, timeout_s)
    return list(long_steps(runner, request, H200))


@pytest.fixture(scope="module")
def measured(without_gpus: None, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """What four devices ran, and the results after each run."""
    ranks = FakeRanks([*RECORDS, PEAK])
    return ranks, measure(tmp_path_factory.mktemp("long"), REQUEST, ranks)


def test_the_layers_are_the_most_that_fit_and_are_short_enough(measured: Measured) -> None:
    ranks, results = measured
    rows = results[-1]["rows"]
    for row in (row for row in rows.values() if row["model"] == "7b_hybrid"):
        (settings,) = (s for name, _, s in ranks.started if name == f"long-hybrid-{row['seq_length']}")

        def fits(layers: int, settings: list[str] = settings) -> bool:
            plan = preview(compose_run([*settings, f"model.num_layers={layers}"]), 4, H200)
            assert plan.prediction is not None
            return plan.memory.total <= 0.9 * H200.memory and plan.prediction.time.total <= 60

        assert fits(row["layers"])
        assert row["layers"] == 32 or not fits(row["layers"] + 4)
    assert [row["seq_length"] for row in rows.values() if row["model"] == "7b_hybrid"] == [128 * K, 512 * K]


def test_the_dense_model_takes_the_longest_sequence_whose_step_is_short_enough(measured: Measured) -> None:
    rows = measured[1][-1]["rows"]
    (dense,) = (row for row in rows.values() if row["model"] == "7b_dense")
    assert dense["seq_length"] == 128 * K  # at 512k its step is predicted to take 150 s
    assert dense["layers"] == rows[f"long hybrid {128 * K}"]["layers"]


def test_losses_are_compared_with_two_devices_at_layers_that_fit_them(measured: Measured) -> None:
    ranks, results = measured
    compared = [(name, size) for name, size, _ in ranks.started if name.startswith("agreement")]
    rounded = [("agreement-cp2-gather", 2), ("agreement-cp2-overlapped", 2), ("agreement-tp2", 2)]
    assert sorted(compared) == sorted([("agreement-one", 2), ("agreement-cp4", 4), *rounded])
    assert not results[0]["agreement"]["agrees"]  # nothing to compare with yet
    last = results[-1]["agreement"]
    assert (last["agrees"], last["deviation"], last["seq_length"]) == (True, {"cp4": 0.0}, 64 * K)


def test_losses_of_two_devices_are_compared_with_one(tmp_path: Path) -> None:
    ranks = FakeRanks(RECORDS)
    last = measure(tmp_path, replace(REQUEST, lengths=[128 * K]), ranks, devices=2)[-1]["agreement"]
    compared = [(name, size) for name, size, _ in ranks.started if name.startswith("agreement")]
    assert compared == [("agreement-one", 1), ("agreement-cp2", 2), ("agreement-tp2", 2)]
    assert (last["agrees"], last["compared_with"]) == (True, "cp1")


def test_a_step_of_more_than_twenty_seconds_is_measured_once(measured: Measured) -> None:
    ranks, results = measured
    steps = {
        name: [setting for setting in settings if setting.startswith("train.steps")]
        for name, _, settings in ranks.started
        if name.startswith("long-hybrid")
    }
    rows = results[-1]["rows"]
    assert rows[f"long hybrid {512 * K}"]["predicted_s"] > 20 > rows[f"long hybrid {128 * K}"]["predicted_s"]
    assert steps == {f"long-hybrid-{128 * K}": ["train.steps=3"], f"long-hybrid-{512 * K}": ["train.steps=2"]}


def test_a_row_has_medians_after_the_first_step_and_memory_beside_the_plan(measured: Measured) -> None:
    row = measured[1][-1]["rows"][f"long hybrid {128 * K}"]
    assert (row["step_time_s"], row["tokens_per_s"]) == (3.75, 250.0)
    assert (row["memory_gib"], row["planned_gib"]) == (6.5, 7.0)
    assert row["is_finite"]
    assert row["predicted_s"] > 1


def test_a_loss_that_is_not_finite_is_said(tmp_path: Path) -> None:
    broken = [*RECORDS[:2], {**RECORDS[2], "loss": None}]
    rows = measure(tmp_path, replace(REQUEST, lengths=[128 * K]), FakeRanks(broken))
    assert not rows[-1]["rows"][f"long hybrid {128 * K}"]["is_finite"]


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (
            {"lengths": [128 * K, 4096 * K]},
            r"--long-lengths=4194304: 4 layers on 4 devices need 2\d\d\.\d GiB each, of 125\.7",
        ),
        (
            {"lengths": [512 * K], "step_s": 1.0},
            r"--long-lengths=524288: 4 layers on 4 devices take \d s a step, .* raise",
        ),
        ({"agreement": 4096 * K}, r"--long-agreement=4194304: 4 layers on 2 devices need .* Set a smaller one"),
        ({"layers": 32, "lengths": [1024 * K]}, r"--long-layers=32: at 1048576 tokens need .* Set fewer"),
        ({"lengths": [128 * K + 1]}, r"--long-lengths=131073: .*Set --long-lengths to a multiple of 8"),
        ({"agreement": 1001}, r"--long-agreement=1001: .*Set --long-agreement to a multiple of 4"),
        ({"settings": ["parallel.cp=2"]}, r"parallel\.cp=2: runs of --long need"),
        ({"settings": ["model.num_layers=4"]}, r"model\.num_layers=4: runs of --long need"),
    ],
)
def test_what_cannot_run_is_rejected_before_any_run(changed: dict[str, Any], line: str, tmp_path: Path) -> None:
    ranks = FakeRanks(RECORDS)
    with pytest.raises(ConfigError, match=rf"^{line}"):
        measure(tmp_path, replace(REQUEST, **changed), ranks)
    assert ranks.started == []


def test_losses_that_only_tensor_parallelism_could_round_otherwise_are_not_compared(tmp_path: Path) -> None:
    request = replace(REQUEST, lengths=[128 * K], settings=["loss=linear"])
    with pytest.raises(ConfigError, match=r"^--gpus=2: .*Set --gpus 4"):
        measure(tmp_path, request, FakeRanks(RECORDS), devices=2)


def test_it_is_said_that_unknown_rates_limit_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = Runner(tmp_path / "runs", 4, Recorded(tmp_path / "jobs.json"), FakeRanks(RECORDS))
    long_steps(runner, replace(REQUEST, lengths=[128 * K]), replace(H200, name="GPU", rates=None))
    assert "warning: rates of GPU are unknown" in capsys.readouterr().err


def test_smaller_logits_are_proposed_only_where_they_make_room(tmp_path: Path) -> None:
    a100 = Hardware("NVIDIA A100-SXM4-80GB", "cuda", 85_000_000_000, gpu_rates("NVIDIA A100-SXM4-80GB"), (8, 0))
    for size, remedy in (("7b", "or set a smaller --long-size"), ("1b", "or add loss=linear for smaller logits")):
        runner = Runner(tmp_path / "runs", 4, Recorded(tmp_path / "jobs.json"), FakeRanks(RECORDS))
        with pytest.raises(ConfigError, match=rf"^--long-lengths=1048576: 4 layers .*{remedy}$"):
            long_steps(runner, replace(REQUEST, size=size, lengths=[1024 * K]), a100)


def test_letters_for_more_than_four_layers_are_repeated(tmp_path: Path) -> None:
    request = replace(REQUEST, size="1b", lengths=[512 * K], step_s=6.0, settings=["layout.layers=DSSSSSSS"])
    (row, *_) = measure(tmp_path, request, FakeRanks(RECORDS))[-1]["rows"].values()
    assert row["layers"] == 8


def test_runs_that_would_exceed_their_time_limit_are_rejected_before_any_run(tmp_path: Path) -> None:
    ranks, long = FakeRanks(RECORDS), replace(REQUEST, lengths=[128 * K, 512 * K], step_s=200.0)
    expected = r"--timeout=300: long dense 524288 takes .* 2 steps .* Set at least"
    with pytest.raises(ConfigError, match=expected) as found:
        measure(tmp_path, long, ranks)
    assert ranks.started == []
    (needed,) = re.findall(r"at least (\d+)", str(found.value))
    with pytest.raises(ConfigError, match=rf"--timeout={int(needed) - 1}: "):
        measure(tmp_path, long, ranks, timeout_s=int(needed) - 1)


def test_a_long_enough_limit_admits_the_runs(tmp_path: Path) -> None:
    ranks = FakeRanks(RECORDS)
    measure(tmp_path, replace(REQUEST, lengths=[512 * K], step_s=200.0), ranks, timeout_s=1000)
    assert f"long-hybrid-{512 * K}" in ranks.names
