"""The plan of a study says what its data are too small for."""

from pathlib import Path

import pytest

from s2train.study.files import Folders
from s2train.study.plan import data_notes
from s2train.study.settings import Recipe
from s2train.study.variants import Run
from tests.data_fixtures import write_dataset

RECIPE = Recipe(1e-3, 1 << 17)


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path, Path("launch"))


def test_a_plan_warns_of_few_tokens(folders: Folders) -> None:
    folders.data.mkdir()
    for path in (folders.train_data, folders.held_out_data):
        write_dataset(path, ["x" * 9_999, "y" * 4_999])
    notes = data_notes(folders, RECIPE, [Run("hybrid"), Run("hybrid", "64k"), Run("hybrid", "16k-needles")])
    assert "20,003 epochs of 15,000 training tokens" in notes[0]
    assert [note.split(",")[0] for note in notes[1:]] == [
        "warning: the run takes 20",
        "warning: an evaluation reads 1",
        "warning: `evaluate` probes 16",
    ]
    assert "and there are 15,000, which it repeats" in notes[2]
    assert "the longest held-out document has 10,000" in notes[3]


def test_a_plan_without_data_or_of_runs_that_start_from_others_has_no_notes(folders: Folders) -> None:
    assert data_notes(folders, RECIPE, [Run("hybrid")]) == []
    folders.data.mkdir()
    for path in (folders.train_data, folders.held_out_data):
        write_dataset(path, ["x" * 99])
    assert data_notes(folders, RECIPE, [Run("hybrid", "64k")]) == []
