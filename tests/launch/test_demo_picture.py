"""The picture that the demo draws of its needle evaluations."""

from pathlib import Path

from s2train.needles.results import Cell, NeedleResults
from tests.program import Outcome, run


def evaluation(path: Path, correct: int) -> Path:
    """An evaluation of two cells, `correct` of 4 trials right in each."""
    cells = [Cell(64, depth, correct, 4, 0.5, 0.5) for depth in (0.0, 1.0)]
    NeedleResults("runs/demo", 100 * correct, {}, [64], [0.0, 1.0], cells).save(path)
    return path


def judged(folder: Path, *correct: int) -> Outcome:
    files = [f"run {n}={evaluation(folder / f'{n}.json', count)}" for n, count in enumerate(correct)]
    words = [str(folder / "needle.png"), *files, "--least", "0.75"]
    return run("demo_picture.py", *words, processes=0, pictures=True)


def test_the_demo_passes_where_the_last_evaluation_reaches_the_threshold(tmp_path: Path) -> None:
    outcome = judged(tmp_path, 0, 3).succeeded()
    assert "run 1: 6 of 8 needles retrieved (75 %)" in outcome.out
    assert (tmp_path / "needle.png").stat().st_size > 1000


def test_the_demo_fails_where_the_last_evaluation_is_below_the_threshold(tmp_path: Path) -> None:
    outcome = judged(tmp_path, 4, 2)
    assert outcome.status == 1
    assert "error: run 1: 4 of 8 needles retrieved (50 %); at least 75 % were expected" in outcome.err
    assert (tmp_path / "needle.png").is_file()


def test_the_picture_needs_an_evaluation_for_each_panel(tmp_path: Path) -> None:
    outcome = run("demo_picture.py", str(tmp_path / "a.png"), f"x={tmp_path}/none.json", "--least", "0", processes=0)
    assert outcome.status == 2
    assert "none.json: not NAME=FILE with an evaluation" in outcome.err
