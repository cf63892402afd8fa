"""Finished runs are summarized and compared."""

import json
from pathlib import Path
from typing import Any

import pytest

from s2train.comparison.runs import compare, summarize
from s2train.errors import ConfigError


def report(step: int, **changes: Any) -> dict[str, Any]:
    speed = {"step_time_s": 0.5, "tokens_per_s": 200.0, "model_tflops": 1.0, "memory_gib": 2.0}
    return {"step": step, "loss": 5 - step / 100, **speed, **changes}


def write(run_dir: Path, *records: dict[str, Any], end: str = "") -> Path:
    run_dir.mkdir()
    first = {"event": "config", "tokens_per_step": 100}
    lines = [json.dumps(record) + "\n" for record in (first, *records)]
    (run_dir / "metrics.jsonl").write_text("".join(lines) + end)
    return run_dir


def test_a_summary_holds_the_last_losses_and_the_median_speed_after_the_first_tenth(tmp_path: Path) -> None:
    slow_start = report(1, tokens_per_s=1.0)
    steady = [report(step, tokens_per_s=float(step)) for step in (20, 30, 40)]
    run = write(tmp_path / "run", slow_start, *steady, report(50, tokens_per_s=50.0, held_out_loss=4.7, memory_gib=3.0))
    summary = summarize(run)
    assert (summary.name, summary.steps, summary.tokens) == ("run", 50, 5000)
    assert (summary.loss, summary.held_out_loss) == (4.5, 4.7)
    assert summary.tokens_per_s == 35
    assert summary.peak_memory_gib == 3
    assert summary.mfu is None


START = {"event": "config", "tokens_per_step": 100}


def test_speed_is_that_of_reports_without_a_start(tmp_path: Path) -> None:
    slow = {"tokens_per_s": 10.0, "step_time_s": 9.0}
    begun = write(tmp_path / "begun", report(5, **slow), report(10))
    resumed = [report(15), START, {"event": "resume", "step": 15}, report(20, **slow), report(25, tokens_per_s=210.0)]
    both = [summarize(begun), summarize(write(tmp_path / "resumed", report(10, **slow), *resumed))]
    assert [(run.tokens_per_s, run.step_time_s, run.times_a_start) for run in both] == [
        (200, 0.5, False),
        (205, 0.5, False),
    ]
    assert compare([tmp_path / "begun", tmp_path / "resumed"], tmp_path / "out", "").caption is None


def test_speed_of_a_start_is_noted(tmp_path: Path) -> None:
    once = write(tmp_path / "once", report(10, tokens_per_s=10.0))
    assert summarize(once).tokens_per_s == 10
    table = compare([once, write(tmp_path / "twice", report(5), report(10))], tmp_path / "out", "")
    assert "1 of 2 runs include a start" in str(table.caption)


def test_a_truncated_line_is_ignored(tmp_path: Path) -> None:
    run = write(tmp_path / "run", report(10), end=json.dumps(report(20))[:30])
    assert summarize(run).steps == 10


def test_steps_repeated_after_a_resume_count_once(tmp_path: Path) -> None:
    lost = [report(step, tokens_per_s=1.0, loss=9.0) for step in (20, 30, 40)]
    again = [report(step, tokens_per_s=100.0) for step in (20, 30)]
    summary = summarize(write(tmp_path / "run", report(10), *lost, {"event": "resume", "step": 10}, *again))
    assert (summary.steps, summary.loss, summary.tokens_per_s) == (30, 4.7, 100)


def test_a_diverged_run_has_no_loss(tmp_path: Path) -> None:
    run = write(tmp_path / "run", report(10), report(20, loss=None))
    assert summarize(run).loss is None
    assert compare([run], tmp_path / "out", "").row_count == 1


@pytest.mark.parametrize(
    ("seeds", "orders", "batches", "note"),
    [
        ((1, 1), (None, None), (2, 2), ""),
        ((1, 2), (None, None), (2, 2), "different samples"),
        ((1, 2), (3, 3), (2, 2), ""),
        ((1, 2), (2, None), (2, 2), ""),
        ((1, 1), (2, 3), (2, 2), "different samples"),
        ((1, 1), (None, None), (2, 4), "64 to 128 tokens"),
    ],
)
def test_held_out_losses_over_different_tokens_are_noted(
    seeds: tuple[int, int], orders: tuple[int | None, int | None], batches: tuple[int, int], note: str, tmp_path: Path
) -> None:
    runs = []
    for number, (seed, order, count) in enumerate(zip(seeds, orders, batches, strict=True)):
        runs.append(write(tmp_path / str(number), report(5), report(10, held_out_loss=4.0)))
        evaluation = {"batches": count, "seed": order}
        own = {"evaluation": evaluation, "train": {"global_batch_size": 4, "seq_length": 8}, "seed": seed}
        (runs[-1] / "config.yaml").write_text(json.dumps(own))
    caption = str(compare(runs, tmp_path / "out", "").caption or "")
    assert note in caption
    assert bool(caption) == bool(note)


def test_a_run_that_has_reported_nothing_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"runs=.*run: has reported no step"):
        summarize(write(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"runs=.*none: has no metrics"):
        summarize(tmp_path / "none")


def test_an_output_name_may_contain_a_dot(tmp_path: Path) -> None:
    run = write(tmp_path / "run", report(10))
    compare([run], tmp_path / "out.v2", "a command")
    content = json.loads((tmp_path / "out.v2.json").read_text())
    assert content["command"] == "a command"
    assert content["runs"][0]["name"] == "run"
    assert (tmp_path / "out.v2.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("suffix", [".json", ".png"])
def test_an_output_may_be_named_with_its_suffix(tmp_path: Path, suffix: str) -> None:
    run = write(tmp_path / "run", report(10))
    compare([run], tmp_path / f"out{suffix}", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.png", "run"]


def test_few_tokens_are_not_rounded_to_zero(tmp_path: Path) -> None:
    table = compare([write(tmp_path / "run", report(10, model_tflops=0.0123))], tmp_path / "out", "")
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert (cells["tokens"], cells["TFLOP/s"]) == (["1.0k"], ["0.0123"])


def test_consumed_tokens_are_taken_from_the_reports(tmp_path: Path) -> None:
    older, newer = write(tmp_path / "a", report(10)), write(tmp_path / "b", report(10, consumed_tokens=700))
    assert (summarize(older).tokens, summarize(newer).tokens) == (1000, 700)


@pytest.mark.parametrize("suffix", [".json", ".png"])
def test_nothing_is_overwritten(tmp_path: Path, suffix: str) -> None:
    run = write(tmp_path / "run", report(10))
    kept = tmp_path / f"out{suffix}"
    kept.write_text("kept")
    with pytest.raises(ConfigError, match=f"out{suffix} exists"):
        compare([run], tmp_path / "out", "")
    assert kept.read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run", kept.name])


def test_an_output_that_names_no_file_is_rejected(tmp_path: Path) -> None:
    run = write(tmp_path / "run", report(10))
    for output in (Path("."), tmp_path / ".json", run / "metrics.jsonl" / "out"):
        with pytest.raises(ConfigError, match="output="):
            compare([run], output, "")


def test_a_run_in_place_of_the_output_is_rejected(tmp_path: Path) -> None:
    runs = [write(tmp_path / name, report(10)) for name in ("hybrid", "dense")]
    with pytest.raises(ConfigError, match=r"output=.*hybrid: is the folder of a run"):
        compare(runs[1:], runs[0], "")


def test_two_runs_with_the_same_name_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    runs = [write(tmp_path / "run", report(10)), write(tmp_path / "other" / "run", report(10))]
    with pytest.raises(ConfigError, match="share a name"):
        compare(runs, tmp_path / "out", "")


@pytest.mark.parametrize(
    ("one", "other", "note"),
    [
        ({"path": "a", "split": [9, 1, 0]}, {"path": "a", "split": [9, 1, 0]}, ""),
        ({"path": "a", "split": [9, 1, 0]}, {"path": "a", "split": [8, 2, 0]}, "data.split=[8,2,0]"),
        ({"path": "a", "valid_path": "c"}, {"path": "b", "valid_path": "c"}, ""),
        ({"path": "a", "valid_path": "c"}, {"path": "a", "valid_path": ["d", "e"]}, "data.valid_path=[d,e]"),
        ({"valid_path": "c", "tokenizer": "t"}, {"valid_path": "c", "tokenizer": "u"}, "data.tokenizer=u"),
    ],
)
def test_held_out_losses_of_different_texts_are_noted(
    one: dict[str, Any], other: dict[str, Any], note: str, tmp_path: Path
) -> None:
    runs = []
    for number, data in enumerate((one, other)):
        runs.append(write(tmp_path / str(number), report(5), report(10, held_out_loss=4.0)))
        (runs[-1] / "config.yaml").write_text(json.dumps({"data": data}))
    caption = str(compare(runs, tmp_path / "out", "").caption or "")
    assert note in caption
    assert bool(caption) == bool(note)
