"""A generation rejects bad settings before it uses a device, and reads prompts from texts and files."""

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from s2train.command_line.overrides import quote_text
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.generation.config import GenerateConfig
from s2train.generation.request import Request, read_request
from tests.needles.test_request import save, save_masked

CPU = Hardware("CPU", "cpu", 1 << 30)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint with the settings of a run on bytes and no weights."""
    return save(tmp_path / "run")


def read(checkpoint: Path, prompt: Any = "Alice", world_size: int = 1, **settings: Any) -> Request:
    return read_request(GenerateConfig(str(checkpoint), prompt, **settings), world_size, CPU)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 10**9),  # more blocks than a layout is built for
        ("batch_size", 0),
        ("prefill_chunk", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", 0),
        ("seed", -1),
        ("attention_backend", "triton"),
        ("cuda_graph", True),
        ("tokenizer", "missing.json"),
        ("checkpoint", "missing"),
        ("output", ""),
        ("output", "."),
        ("prompt", 5),
        ("prompt", []),
        ("prompt", ["text", None]),
        ("prompt", ""),
        ("prompt", "file:missing.txt"),
        ("prompt", "file:"),
        ("tp", 2),
        ("tp", 0),
    ],
)
def test_a_bad_setting_is_rejected_by_its_name(checkpoint: Path, setting: str, value: Any) -> None:
    given: dict[str, Any] = {"checkpoint": str(checkpoint), "prompt": "Alice"} | {setting: value}
    with pytest.raises(ConfigError) as raised:
        read_request(GenerateConfig(**given), 1, CPU)
    assert raised.value.setting == setting
    assert raised.value.remedy


@pytest.mark.parametrize(("setting", "value"), [("top_k", 5), ("top_p", 0.5)])
def test_greedy_decoding_samples_from_nothing(checkpoint: Path, setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{setting}={value}: temperature=0 takes the likeliest"):
        read(checkpoint, **{setting: value})
    assert read(checkpoint, **{setting: value, "temperature": 1.0})


def test_processes_that_tp_does_not_use_are_rejected(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"^tp=1: does not equal the 2 processes"):
        read(checkpoint, world_size=2)


def test_an_existing_output_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.json").touch()
    with pytest.raises(ConfigError, match=r"^output=.*exists.*overwrite=true"):
        read(checkpoint, output=str(tmp_path / "texts.json"))
    assert read(checkpoint, output=str(tmp_path / "texts.json"), overwrite=True)


def test_a_layout_that_ends_before_the_text_is_rejected(tmp_path: Path) -> None:
    checkpoint = save_masked(tmp_path / "run")
    assert read(checkpoint, "x" * 28, max_tokens=100)
    with pytest.raises(ConfigError, match=r"^max_tokens=101: the checkpoint's layout is shorter"):
        read(checkpoint, "x" * 28, max_tokens=101)


def test_prompts_are_texts_and_files_in_their_order(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("A file's\ntext \n")
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("x\n", "y")))
    files = [f"file:{tmp_path / name}" for name in ("one.txt", "more.jsonl")]
    request = read(checkpoint, ["Alice", *files])
    assert request.prompts == ("Alice", "A file's\ntext ", "x\n", "y")
    assert [bytes(ids).decode() for ids in request.ids] == list(request.prompts)
    assert request.longest == 14


def test_a_file_without_text_is_rejected(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ConfigError, match=r"^prompt=file:.*empty.txt: holds no text"):
        read(checkpoint, f"file:{tmp_path / 'empty.txt'}")


def test_a_key_that_is_missing_is_named(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"question": "why"}\n')
    with pytest.raises(ConfigError, match=r'^prompt=file:.*has no "text", its keys: question'):
        read(checkpoint, f"file:{tmp_path / 'prompts.jsonl'}")
    assert read(checkpoint, f"file:{tmp_path / 'prompts.jsonl'}", text_key="question").prompts == ("why",)


@pytest.mark.parametrize(
    "text",
    [
        "Alice was",
        "1,2,3",
        "12",
        "null",
        "it's",
        'say "no"',
        "a: {b} [c",
        "${model.name} $x",
        "über\nunter",
        "x=1",
        "a\\",
        '"No," said Alice, "never."',
        "'A' and 'B'",
        "'a\\'",
    ],
)
def test_a_prompt_on_the_command_line_is_read_as_typed(text: str) -> None:
    from hydra import compose, initialize_config_dir

    from s2train.command_line.composition import CONF
    from s2train.generation.config import register

    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("generate", ["checkpoint=runs/x", *quote_text([f"prompt={text}"], "prompt")])
    assert OmegaConf.to_container(composed, resolve=True)["prompt"] == text  # type: ignore[call-overload, index]


def test_lists_and_quoted_prompts_stay_as_they_are() -> None:
    given = ['prompt=["a","b"]', "prompt='quoted'", 'prompt="a \\\\\\"b"', "max_tokens=5", "--help"]
    assert quote_text(given, "prompt") == given
