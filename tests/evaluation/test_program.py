"""launch/evaluate.py measures a checkpoint of launch/pretrain.py on texts and on a task."""

import json
import math
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.program import Outcome, error_line, pretrain, run

pytestmark = [pytest.mark.slow]

SLIDING = ["length=64", "windows=sliding", "stride=16", "batch_size=3"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a model that knows that letters are likelier than other bytes."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    settings = ["train.steps=30", "optim.lr=1e-2", "train.precision=fp32", "tracking.log_interval=30"]
    settings += ["train.global_batch_size=4"]
    pretrain(folder, *settings, processes=0).succeeded()
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Text like the model's, and bytes that it never saw."""
    folder = tmp_path_factory.mktemp("texts")
    likely, unlikely = folder / "likely.txt", folder / "unlikely.txt"
    likely.write_text("the Rabbit said to Alice that it was late, and ran on. " * 3)
    unlikely.write_text("{]~%" * 20)
    return likely, unlikely


def evaluate(checkpoint: Path, output: Path, *arguments: str, processes: int = 0) -> Outcome:
    given = [f"checkpoint={checkpoint}", f"output={output}", *arguments]
    return run("evaluate.py", *given, processes=processes)


@pytest.fixture(scope="module")
def alone(
    checkpoint: Path, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Outcome, dict[str, Any]]:
    """What one process prints and writes."""
    output = tmp_path_factory.mktemp("alone") / "evaluation.json"
    done = evaluate(checkpoint, output, f"text=[{texts[0]},{texts[1]}]", *SLIDING).succeeded()
    return done, json.loads(output.read_text())


def test_each_text_has_its_loss_and_perplexity(alone: tuple[Outcome, dict[str, Any]], texts: tuple[Path, Path]) -> None:
    done, content = alone
    likely, unlikely = content["texts"]
    assert (likely["file"], unlikely["file"]) == (str(texts[0]), str(texts[1]))
    assert (likely["tokens"], likely["bytes"], likely["documents"]) == (165, 165, 1)
    assert likely["loss"] + 1 < math.log(257) < unlikely["loss"]
    assert likely["perplexity"] == pytest.approx(math.exp(likely["loss"]))
    assert likely["bits_per_byte"] == pytest.approx(likely["loss"] / math.log(2))  # a token is a byte
    assert f"{texts[0]}: loss {likely['loss']:.4f}, perplexity" in done.out


def test_the_file_records_the_command(checkpoint: Path, alone: tuple[Outcome, dict[str, Any]]) -> None:
    program, *arguments = shlex.split(alone[1]["command"])
    assert Path(program).name == "evaluate.py"
    assert {f"checkpoint={checkpoint}", *SLIDING} <= set(arguments)
    assert (alone[1]["step"], alone[1]["length"], alone[1]["stride"]) == (30, 64, 16)


@pytest.mark.parametrize("arguments", [[], ["tp=2", "prefill_chunk=16"]], ids=["dp2", "tp2"])
def test_two_processes_measure_the_same(
    checkpoint: Path,
    texts: tuple[Path, Path],
    alone: tuple[Outcome, dict[str, Any]],
    tmp_path: Path,
    arguments: list[str],
) -> None:
    given = [f"text=[{texts[0]},{texts[1]}]", *SLIDING, *arguments]
    evaluate(checkpoint, tmp_path / "out.json", *given, processes=2).succeeded()
    for found, expected in zip(
        json.loads((tmp_path / "out.json").read_text())["texts"], alone[1]["texts"], strict=True
    ):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["by_position"] == [[a, b, pytest.approx(x, rel=1e-5)] for a, b, x in expected["by_position"]]
        assert found["tokens"] == expected["tokens"]


def test_figures_that_are_not_finite_are_null(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    pretrain(
        tmp_path / "run",
        "train.steps=1",
        "train.precision=fp32",
        "optim.lr=1e18",
        "optim.warmup_steps=0",
        processes=0,
    ).succeeded()
    evaluate(tmp_path / "run", tmp_path / "out.json", f"text={texts[0]}", *SLIDING).succeeded()
    text = (tmp_path / "out.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["texts"][0]["perplexity"] is None


def test_bad_input_is_rejected_with_one_line(checkpoint: Path, tmp_path: Path) -> None:
    done = evaluate(checkpoint, tmp_path / "out.json", "text=missing.txt")
    assert done.status == 2
    assert error_line(done).startswith("error: text=missing.txt: no such file")
    assert not (tmp_path / "out.json").exists()


def test_losses_are_of_the_attention_that_was_trained(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    """HyperAttention's cache is read exactly: as if the layers were dense."""
    pretrain(
        tmp_path / "hyper",
        "layout=hyper_b16",
        "layout.layers=H",
        "train.steps=12",
        "train.precision=fp32",
        "optim.lr=1e-2",
        processes=0,
    ).succeeded()
    shutil.copytree(tmp_path / "hyper", tmp_path / "dense")
    for path in (tmp_path / "dense").rglob("config.yaml"):
        path.write_text(path.read_text().replace("layers: H\n", "layers: D\n"))
    losses = []
    for name in ("hyper", "dense"):
        output = tmp_path / f"{name}.json"
        evaluate(tmp_path / name, output, f"text={texts[0]}", "length=128").succeeded()
        losses.append(json.loads(output.read_text())["texts"][0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.2)
    assert losses[0] != pytest.approx(losses[1], rel=1e-6), losses
