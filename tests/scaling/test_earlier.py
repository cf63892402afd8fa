"""A command continues only what a command with its options began."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from s2train.errors import ConfigError
from s2train.files import write_json
from s2train.scaling.earlier import Kept, measured_with

ASKED: dict[str, Any] = {"gpus": 2, "seq_length": 128, "settings": ["loss=liger"], "divisions": None}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def begun(output: str = "two") -> Kept:
    kept = Kept.of(Path(output))
    kept.begin(ASKED, {"asked": ASKED, "parts": {"parity": {}}})
    return kept


def remove_runs(kept: Kept) -> None:
    (kept.runs / "asked.json").unlink()
    kept.runs.rmdir()


def problem(kept: Kept, asked: dict[str, Any]) -> str:
    with pytest.raises(ConfigError, match=r"^OUTPUT=\S+: .*Name another, or move it away$") as found:
        kept.earlier(asked)
    return found.value.problem


def test_the_same_options_continue_with_and_without_the_runs() -> None:
    kept = begun("results/two.json")
    assert kept.earlier(ASKED)["parts"] == {"parity": {}}
    remove_runs(kept)
    assert kept.earlier(ASKED)["parts"] == {"parity": {}}


def test_nothing_is_written_before_the_first_run(tmp_path: Path) -> None:
    assert Kept.of(Path("results/two")).earlier(ASKED) == {}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("remove", [remove_runs, lambda kept: kept.results.unlink()])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seq_length": 256}, "exists, of --seq-length=128"),
        ({"settings": []}, "exists, of loss=liger"),
        ({"settings": ["loss=liger", "seed=2"]}, "exists, of no seed=2"),
        ({"divisions": ["one"], "gpus": 4}, "exists, of --gpus=2, no --divisions"),
    ],
)
def test_other_options_are_rejected_by_name(changed: dict[str, Any], said: str, remove: Callable[[Kept], None]) -> None:
    kept = begun()
    remove(kept)
    assert problem(kept, ASKED | changed).endswith(said)


def test_runs_of_another_output_are_not_taken_for_its_own() -> None:
    begun("first/two")
    assert problem(Kept.of(Path("second/two")), ASKED) == "runs/scaling-two exists, of OUTPUT=first/two.json"


def test_results_of_jobs_alone_are_of_unknown_options() -> None:
    kept = Kept.of(Path("two"))
    write_json(kept.jobs, {"one": {"records": []}})
    assert problem(kept, ASKED).startswith("two.jobs.json exists without two.json")


@pytest.mark.parametrize("content", ["no JSON", "[]", json.dumps({"rows": []})])
def test_another_programs_file_is_not_overwritten(content: str) -> None:
    Path("two.json").write_text(content)
    assert problem(Kept.of(Path("two")), ASKED).startswith("two.json exists, and ")


def test_a_part_of_a_copied_file_is_rejected() -> None:
    kept = begun()
    kept.jobs.write_text('{"one": {"rec')
    assert problem(kept, ASKED) == "two.jobs.json exists, and is not of this program"


def test_runs_of_an_earlier_version_continue() -> None:
    kept = begun()
    write_json(kept.runs / "asked.json", ASKED)  # which did not name OUTPUT
    assert kept.earlier(ASKED)["parts"] == {"parity": {}}


def test_other_hardware_is_added_to_that_of_the_first_results(capsys: pytest.CaptureFixture[str]) -> None:
    first = {"date": "2026-01-01", "device": "H100", "torch": "2.9"}
    assert measured_with({}, first) == first
    assert measured_with(first, first | {"date": "2026-01-02"}) == first
    assert capsys.readouterr().err == ""
    other = {"date": "2026-01-03", "device": "H200", "torch": "2.9"}
    found = first
    for _ in range(2):
        found = measured_with(found, other)
    assert found == first | {"resumed_with": [{"date": "2026-01-03", "device": "H200"}]}
    assert "earlier results were measured on H100, and this is H200" in capsys.readouterr().err
