"""launch/generate.py continues prompts with a checkpoint of launch/pretrain.py."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.program import Outcome, error_line, pretrain, run

pytestmark = [pytest.mark.slow]

PROMPTS = 'prompt=["Alice was beginning","it\'s 1, 2","x"]'
SAMPLED = ["max_tokens=24", "temperature=1.5", "top_k=80", "top_p=0.99", "seed=3"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a model that has learnt next to nothing."""
    folder = tmp_path_factory.mktemp("generate") / "run"
    pretrain(folder, "train.steps=3", "optim.warmup_steps=1", "train.precision=fp32", processes=0).succeeded()
    return folder


def generate(checkpoint: Path, *arguments: str, processes: int = 0) -> Outcome:
    return run("generate.py", f"checkpoint={checkpoint}", *arguments, processes=processes)


def written(output: Path) -> dict[str, Any]:
    return json.loads(output.read_text())


def as_printed(text: str) -> str:
    """With the line ends that reading a program's output gives: random bytes hold others."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


@pytest.fixture(scope="module")
def sampled(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, dict[str, Any]]:
    """What one process prints and writes."""
    output = tmp_path_factory.mktemp("sampled") / "texts.json"
    done = generate(checkpoint, PROMPTS, *SAMPLED, f"output={output}").succeeded()
    return done, written(output)


def test_several_prompts_are_continued_one_below_the_other(sampled: tuple[Outcome, dict[str, Any]]) -> None:
    done, content = sampled
    texts = content["texts"]
    assert [one["prompt"] for one in texts] == ["Alice was beginning", "it's 1, 2", "x"]
    expected = "".join(f"--- {i} of 3: {one['prompt']}\n{one['text']}\n" for i, one in enumerate(texts, 1))
    assert done.out == as_printed(expected)
    for one in texts:
        assert one["ended"] or len(one["tokens"]) == 24
        assert one["text"] == bytes(one["tokens"]).decode(errors="replace")
    assert "tokens/s" in done.err


def test_the_file_records_settings_and_the_command(checkpoint: Path, sampled: tuple[Outcome, dict[str, Any]]) -> None:
    _, content = sampled
    expected = {"max_tokens": 24, "temperature": 1.5, "top_k": 80, "top_p": 0.99, "seed": 3}
    assert content["settings"] == expected
    assert content["step"] == 3
    program, *arguments = shlex.split(content["command"])
    assert Path(program).name == "generate.py"
    assert {f"checkpoint={checkpoint}", *SAMPLED} <= set(arguments)


def test_tensor_parallel_ranks_give_the_same_texts(
    checkpoint: Path, sampled: tuple[Outcome, dict[str, Any]], tmp_path: Path
) -> None:
    output = tmp_path / "texts.json"
    done = generate(checkpoint, PROMPTS, *SAMPLED, f"output={output}", "tp=2", processes=2).succeeded()
    assert done.out == sampled[0].out  # rank 0 alone prints
    assert written(output)["texts"] == sampled[1]["texts"]


def test_a_prompt_in_a_file_is_continued_alone_as_beside_others(
    checkpoint: Path, sampled: tuple[Outcome, dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "prompt.txt").write_text("Alice was beginning\n")
    done = generate(
        checkpoint, f"prompt=file:{tmp_path / 'prompt.txt'}", *SAMPLED, "batch_size=1", "stream=false"
    ).succeeded()
    assert done.out == as_printed(f"{sampled[1]['texts'][0]['text']}\n")  # without a title


def test_bad_input_is_rejected_with_one_line(checkpoint: Path) -> None:
    done = generate(checkpoint, "prompt=Alice", "top_p=0.5")
    assert done.status == 2
    assert error_line(done).startswith("error: top_p=0.5: ")
    assert done.out == ""
