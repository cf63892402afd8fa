"""Needle scores under masks: what decoding would give, under any division, and what is rejected."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from s2train.data.tokenizers import ByteTokenizer
from s2train.errors import ConfigError
from s2train.needles.config import NeedleDocumentsConfig
from s2train.needles.retrieval import NeedleGrid, evaluate_grid
from s2train.needles.samples import TaskSampler
from s2train.preparation.config import PrepareConfig
from s2train.preparation.prepare import prepare
from s2train.semsa.config import FrontierNeedlesConfig
from s2train.semsa.needle_scores import Retrieval, exact_answers
from tests.inference.uncached import LanguageModel, greedy_decode
from tests.needles.fake_models import copier, parrot, short_sighted_copier
from tests.program import ROOT, error_line, run

CPU = torch.device("cpu")
TOKENIZER = ROOT / "launch" / "results" / "demo" / "model" / "tokenizer.json"


def blind_to_sevens(tokens: Tensor, position_ids: Tensor, attention_mask: None) -> Tensor:
    """A copier that gets every digit right but 7, and then copies on."""
    logits = copier(tokens, position_ids, attention_mask)
    logits[..., ord("1")] += 2 * logits[..., ord("7")]
    return logits


def settings(**changed: Any) -> FrontierNeedlesConfig:
    own = {"lengths": [320, 161], "depths": [0.0, 0.6, 1.0], "trials": 6, "seed": int(torch.randint(1 << 20, ()))}
    return FrontierNeedlesConfig(**own | changed)


def retrieval(**changed: Any) -> Retrieval:
    found = Retrieval.read(settings(**changed), ByteTokenizer(), 512)
    assert found is not None
    return found


@pytest.mark.parametrize("model", [copier, parrot, short_sighted_copier, blind_to_sevens])
def test_a_trial_is_exact_where_greedy_decoding_is(model: LanguageModel) -> None:
    asked = retrieval()
    decoded = list(evaluate_grid(partial(greedy_decode, model), asked.sampler, asked.grid, batch_size=8, device=CPU))
    trials = asked.trials()
    assert len(trials) == 2 * 3 * 6
    correct = [0] * len(decoded)
    for trial in trials:
        correct[trial.cell] += int(exact_answers(model, [trial], CPU))  # type: ignore[arg-type]
    assert correct == [cell.correct for cell in decoded]


def test_documents_of_a_batch_are_judged_separately() -> None:
    trials = [trial for trial in retrieval(trials=20).trials() if len(trial.tokens) == 320]
    alone = torch.cat([exact_answers(blind_to_sevens, [trial], CPU) for trial in trials])  # type: ignore[arg-type]
    assert 0 < int(alone.sum()) < len(trials)  # values of seven digits: half of them hold a 7
    assert torch.equal(exact_answers(blind_to_sevens, trials, CPU), alone)  # type: ignore[arg-type]


def test_ranks_share_all_trials() -> None:
    asked = retrieval(trials=5)
    shared = [trial for rank in range(3) for trial in asked.trials(rank, 3)]
    assert sorted((trial.cell, trial.tokens.tolist()) for trial in shared) == sorted(
        (trial.cell, trial.tokens.tolist()) for trial in asked.trials()
    )


def test_trials_are_those_of_the_needle_program() -> None:
    asked = retrieval(seed=3)
    grid = NeedleGrid((320, 161), (0.0, 0.6, 1.0), 6, 3, 0.05)
    sample = grid.sample(TaskSampler(ByteTokenizer()), 320, 0.6, 5)
    (trial,) = [trial for number, trial in enumerate(asked.trials()) if number == 4 * 6 + 5]
    assert trial.tokens.tolist() == [*sample.prompt.tolist(), *sample.answer.tolist()]
    assert trial.asked == len(sample.prompt)


def test_without_lengths_nothing_is_retrieved() -> None:
    assert Retrieval.read(FrontierNeedlesConfig(), ByteTokenizer(), 512) is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lengths": [161, 1024]}, "needles.lengths=1024: the profile has 512 tokens"),
        ({"lengths": []}, r"needles.lengths=\[\]: no length"),
        ({"lengths": [40]}, "needles.lengths=40: needles, question and answer alone take up to"),
        ({"depths": [2.0]}, r"needles.depths=\[2.0\]: not between 0 and 1"),
        ({"depth_jitter": 0.7}, "needles.depth_jitter=0.7: not between"),
        ({"trials": 0}, "needles.trials=0: no trial"),
        ({"batch_size": 0}, "needles.batch_size=0: a batch needs"),
        ({"seed": -1}, "needles.seed=-1: "),
        ({"task": "recall"}, "needles.task=recall: no such task"),
        ({"haystack": 3}, "needles.haystack=3: names no text"),
        ({"haystack": "missing.txt"}, "needles.haystack=missing.txt: can't be read"),
    ],
)
def test_settings_that_can_not_work_are_rejected(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        Retrieval.read(settings(**changed), ByteTokenizer(), 512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped demo model, read as if all its layers were dense, and its profile at 256 tokens.

    It has learned to retrieve under other masks, so that some of its answers are right.
    """
    folder = tmp_path_factory.mktemp("needles")
    weights = ROOT / "launch" / "results" / "demo" / "model"
    run(
        "import.py", f"weights={weights}", f"output={folder / 'run'}", "precision=fp32", f"conf={folder / 'c'}"
    ).succeeded()
    set_layout(folder / "run", {"layers": "DDDD"})
    documents = NeedleDocumentsConfig(documents=64, length=256)
    prepare(PrepareConfig("needles", str(folder / "text"), tokenizer=str(TOKENIZER), needles=documents))
    run(
        "profile_attention.py",
        *inputs(folder),
        f"output={folder / 'profile.npz'}",
        "seq_length=256",
        "samples=1",
        "block_size=16",
        "library.spans=[[2,0]]",
        "library.stripes=[]",
    )  # fmt: skip.succeeded()
    return folder


def set_layout(run_folder: Path, layout: dict[str, Any]) -> None:
    (written,) = run_folder.glob("checkpoints/*/config.yaml")
    trained = yaml.safe_load(written.read_text())
    trained["layout"] |= layout
    written.write_text(yaml.safe_dump(trained))


def inputs(folder: Path) -> list[str]:
    data = [f"data.path={folder / 'text'}", f"data.tokenizer={TOKENIZER}", f"data.cache={folder / 'cache'}"]
    return [f"checkpoint={folder / 'run'}", *data, "data.split=[50,50,0]"]


NEEDLES = ["lengths=[256,187]", "trials=3", "depths=[0.25,1]", "depth_jitter=0"]
DENSITIES = "densities=[0.3,1.0]"


def frontier(folder: Path, name: str, *changed: str, processes: int = 1) -> dict[str, Any]:
    arguments = [*inputs(folder), f"profile={folder / 'profile.npz'}", f"output={folder / name}.json", "samples=2"]
    arguments += [DENSITIES, "draws=0", *(f"needles.{setting}" for setting in NEEDLES), *changed]
    run("layout_frontier.py", *arguments, processes=processes, pictures=name == "alone").succeeded()
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    pytest.importorskip("scipy", reason="the extra semsa is not installed")
    return frontier(folder, "alone", "needles.batch_size=4", f"layouts={folder / 'layouts'}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "squared-0.3"])
def test_a_layout_scores_what_the_needle_program_decodes_under_it(
    folder: Path, alone: dict[str, Any], name: str
) -> None:
    run_folder = folder / f"under-{name}"
    shutil.copytree(folder / "run", run_folder)
    set_layout(run_folder, yaml.safe_load((folder / "layouts" / f"{name}.yaml").read_text()))
    output = f"output={folder / name}"
    run(
        "needle.py", f"checkpoint={run_folder}", f"tokenizer={TOKENIZER}", output, "extra_tokens=0", *NEEDLES
    ).succeeded()
    decoded = json.loads((folder / name / "needle.json").read_text())["cells"]
    (row,) = [row for row in alone["rows"] if row["file"] == f"{name}.yaml"]
    names = ("length", "depth", "correct", "trials")
    assert row["needle_cells"] == [{name: cell[name] for name in names} for cell in decoded]
    assert row["needle_correct"] == sum(cell["correct"] for cell in decoded)
    assert row["needle_trials"] == 12


@pytest.mark.slow
def test_a_layout_that_can_not_see_the_needle_never_answers(folder: Path, alone: dict[str, Any]) -> None:
    (window,) = [row for row in alone["rows"] if (row["layout"], row["budget"]) == ("window", 0.3)]
    # A layer sees at most three of 16 blocks, so that four layers reach back 8 blocks. The needle is 11 away.
    assert window["density"] < 0.35
    (far,) = [cell for cell in window["needle_cells"] if (cell["length"], cell["depth"]) == (256, 0.25)]
    assert far["correct"] == 0
    dense = alone["rows"][0]["needle_cells"]
    assert next(cell["correct"] for cell in dense if (cell["length"], cell["depth"]) == (256, 0.25)) > 0
    whole = [row for row in alone["rows"] if row["budget"] == 1.0 and row["density"] == 1.0]
    assert whole
    assert all(row["needle_cells"] == dense for row in whole)


@pytest.mark.slow
@pytest.mark.parametrize("division", [["tp=2"], []], ids=["tp2", "dp2"])
def test_every_division_scores_the_same(folder: Path, alone: dict[str, Any], division: list[str]) -> None:
    shared = frontier(folder, f"shared{len(division)}", "densities=[0.3]", *division, processes=2)["rows"]
    assert len(shared) > 3
    assert [row["needle_cells"] for row in shared] == [row["needle_cells"] for row in alone["rows"][: len(shared)]]


@pytest.mark.slow
def test_an_interrupted_frontier_keeps_its_scores_and_other_needles_are_not_mixed(
    folder: Path, alone: dict[str, Any]
) -> None:
    marked = [row | {"needle_correct": -1} for row in alone["rows"][:2]]
    (folder / "rest.json").write_text(json.dumps(alone | {"rows": marked, "finished": False}))
    rest = frontier(folder, "rest", "needles.batch_size=3")["rows"]
    assert [row["needle_correct"] for row in rest[:2]] == [-1, -1]
    assert [row["needle_cells"] for row in rest] == [row["needle_cells"] for row in alone["rows"]]
    arguments = [*inputs(folder), f"profile={folder / 'profile.npz'}", f"output={folder / 'rest.json'}", "samples=2"]
    outcome = run("layout_frontier.py", *arguments, DENSITIES, "draws=0")
    assert "exists, measured with another needles" in error_line(outcome)


@pytest.mark.slow
def test_a_missing_tokenizer_is_rejected(folder: Path) -> None:
    arguments = [*inputs(folder), f"profile={folder / 'profile.npz'}", f"output={folder / 'none.json'}"]
    outcome = run("layout_frontier.py", *arguments, "data.tokenizer=gone.json", "needles.lengths=[256]")
    assert error_line(outcome).startswith("error: data.tokenizer=gone.json: ")
