"""Needle documents in the study's folder are reused only for runs that they fit."""

from pathlib import Path

import pytest

from s2train.data.indexed import Metadata
from s2train.data.tokenizers import fingerprint
from s2train.errors import ConfigError
from s2train.study.files import Folders
from s2train.study.needles import Documents, needle_command
from s2train.study.settings import probes_command
from s2train.study.variants import Run


@pytest.mark.parametrize(
    ("tokenizer", "documents", "problem"),
    [("ours", 11, None), ("another", 11, "does not name the tokenizer"), ("ours", 10, "read some twice")],
)
def test_documents_that_do_not_fit_a_run_are_rejected(
    tokenizer: str, documents: int, problem: str | None, tmp_path: Path
) -> None:
    folders = Folders(tmp_path, Path("launch"))
    folders.data.mkdir()
    folders.tokenizer.write_text("ours")
    (tmp_path / "other").write_text("another")
    made_by = fingerprint(str(folders.tokenizer if tokenizer == "ours" else tmp_path / "other"))
    Metadata("name", str(made_by), 257, documents, 1234, 5.0, {}).write(tmp_path / "noise.json")
    found = Documents(tmp_path / "noise", [], drawn=10)
    if problem is None:
        found.check(folders)
    else:
        with pytest.raises(ConfigError, match=problem):
            found.check(folders)


def test_evaluations_take_the_tokenizer_of_the_root_which_may_have_been_moved() -> None:
    folders = Folders(Path("now"), Path("launch"))
    for command in (probes_command(folders, Run("dense")), needle_command(folders, Run("dense", "16k-needles"))):
        assert "tokenizer=now/data/train-tokenizer.json" in command
