"""A trained checkpoint is evaluated and exported with the tokenizer of its data."""

from pathlib import Path

import pytest

from s2train.checkpoints.folders import Progress, write_config
from s2train.checkpoints.hugging_face.config import ExportConfig
from s2train.checkpoints.hugging_face.exporting import export
from s2train.checkpoints.trained import Trained
from s2train.errors import ConfigError
from s2train.planning import compose_run
from tests.program import SMALL


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Holds settings and progress alone, of a run on bytes."""
    folder = tmp_path / "checkpoints" / "iter_0000003"
    folder.mkdir(parents=True)
    write_config(compose_run(SMALL), folder / "config.yaml")
    Progress(3, 24, {}, None, tokenizer="bytes").write(folder / "progress.json")
    return folder


def test_a_file_that_holds_another_tokenizer_by_now_is_rejected(checkpoint: Path, tmp_path: Path) -> None:
    trained = Trained.find(str(checkpoint))
    assert trained.tokenizer(None).name == "bytes"
    Progress(3, 24, {}, None, tokenizer="sha256:of another content").write(checkpoint / "progress.json")
    with pytest.raises(ConfigError, match=r"^tokenizer=bytes: .*iter_0000003 was trained with another one"):
        trained.tokenizer(None)
    with pytest.raises(ConfigError, match=r"^tokenizer=bytes: .*iter_0000003 was trained with another one"):
        export(ExportConfig(str(checkpoint), str(tmp_path / "out")))


def test_checkpoints_that_record_no_tokenizer_take_any(checkpoint: Path) -> None:
    Progress(3, 24, {}, None).write(checkpoint / "progress.json")
    assert Trained.find(str(checkpoint)).tokenizer(None).name == "bytes"
