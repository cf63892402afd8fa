"""An evaluation rejects bad settings before it uses a device."""

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.evaluation.config import EvaluateConfig
from s2train.evaluation.request import Request, read_request
from s2train.evaluation.tasks import load_tasks
from tests.needles.test_request import save, save_masked

CPU = Hardware("CPU", "cpu", 1 << 30)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint with the settings of a run on bytes at 512 tokens, and no weights."""
    return save(tmp_path / "run")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in ("ä" * 300, "b" * 10)))
    return str(path)


def read(checkpoint: Path, world_size: int = 1, **settings: Any) -> Request:
    return read_request(EvaluateConfig(str(checkpoint), **settings), world_size, CPU)


def test_a_name_with_a_star_stands_for_all_files_that_match(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text("some text")
    assert [Path(one.name).name for one in read(checkpoint, text=f"{tmp_path}/*.txt").texts] == ["a.txt", "b.txt"]
    with pytest.raises(ConfigError, match=r"^text=.*/\*.text: no file matches. Give files that exist"):
        read(checkpoint, text=f"{tmp_path}/*.text")
    with pytest.raises(ConfigError, match=r"^text=.*/a.txt: is there twice"):
        read(checkpoint, text=[f"{tmp_path}/*.txt", f"{tmp_path}/a.txt"])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("text", None),
        ("text", []),
        ("text", 5),
        ("text", "missing.txt"),
        ("text", [""]),
        ("length", 1),
        ("stride", 0),
        ("stride", 5),  # without sliding windows
        ("windows", "sliding_window"),
        ("batch_size", 0),
        ("prefill_chunk", 0),
        ("limit", 0),
        ("limit", 5),  # without tasks
        ("fewshot", 2),
        ("task_folder", "."),
        ("output", ""),
        ("output", "."),
        ("wandb", "of"),
        ("seed", -1),
        ("attention_backend", "foo"),
        ("tokenizer", "missing.json"),
        ("checkpoint", "missing"),
        ("tp", 0),
        ("tp", 2),
    ],
)
def test_a_bad_setting_is_rejected_by_its_name(checkpoint: Path, text: str, setting: str, value: Any) -> None:
    given: dict[str, Any] = {"checkpoint": str(checkpoint), "text": text} | {setting: value}
    with pytest.raises(ConfigError) as raised:
        read_request(EvaluateConfig(**given), 1, CPU)
    assert raised.value.setting == setting
    assert raised.value.remedy


def test_a_stride_that_leaves_tokens_out_is_rejected(checkpoint: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"^stride=65: leaves out tokens"):
        read(checkpoint, text=text, length=64, windows="sliding", stride=65)


def test_an_existing_output_is_kept(checkpoint: Path, text: str) -> None:
    (checkpoint / "evaluation.json").touch()
    with pytest.raises(ConfigError, match=r"^output=.*evaluation.json: exists.*overwrite=true"):
        read(checkpoint, text=text)
    assert read(checkpoint, text=text, overwrite=True).output == checkpoint / "evaluation.json"


def test_tasks_are_evaluated_by_one_model(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"^tp=1: tasks are evaluated by one model"):
        read(checkpoint, world_size=2, tasks=["hellaswag"])


def test_a_task_without_the_harness_is_rejected_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^tasks=\[hellaswag\]: .* pip install -e '.\[eval\]'"):
        load_tasks(EvaluateConfig("runs/x", tasks=["hellaswag"]), 64)


def test_a_layout_that_ends_before_the_length_is_rejected(tmp_path: Path, text: str) -> None:
    checkpoint = save_masked(tmp_path / "masked")
    assert read(checkpoint, text=text, length=128)
    with pytest.raises(ConfigError, match=r"^length=129: the checkpoint's layout is shorter"):
        read(checkpoint, text=text, length=129)


def test_a_length_beyond_the_training_is_warned_of(
    checkpoint: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    read(checkpoint, text=text, length=512)
    assert capsys.readouterr().err == ""
    read(checkpoint, text=text, length=1024)
    assert capsys.readouterr().err == "warning: up to 1,024 tokens; the model was trained on 512\n"


def test_documents_are_cut_at_the_trained_length_after_an_end_token(checkpoint: Path, text: str) -> None:
    request = read(checkpoint, text=text)
    assert (request.length, request.stride) == (512, 512)
    (found,) = request.texts
    assert (found.documents, found.bytes) == (2, 610)
    first, second, third = found.windows
    assert (len(first.tokens), len(second.tokens), len(third.tokens)) == (512, 88, 10)
    assert first.tokens[0] == third.tokens[0] == 256
    assert bytes(third.targets.tolist()) == b"b" * 10


def test_sliding_windows_advance_by_half_their_length(checkpoint: Path, text: str) -> None:
    request = read(checkpoint, text=text, length=64, windows="sliding")
    assert request.stride == 32
    assert len(request.texts[0].windows) == 1 + -(-(600 - 64) // 32) + 1


def test_a_model_trained_within_documents_predicts_no_first_token(checkpoint: Path, text: str) -> None:
    path = checkpoint / "checkpoints" / "iter_0000001" / "config.yaml"
    trained = OmegaConf.load(path)
    trained.data.attention_within_documents = True
    OmegaConf.save(trained, path)
    (found,) = read(checkpoint, text=text).texts
    assert found.bytes is None
    assert bytes(found.windows[-1].tokens.tolist()) == b"b" * 9
