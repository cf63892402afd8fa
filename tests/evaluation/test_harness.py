"""Tasks of lm-evaluation-harness are evaluated on a model of ours; needs the extra `eval`."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from s2train.data.tokenizers import ByteTokenizer
from s2train.errors import ConfigError
from s2train.evaluation.config import EvaluateConfig
from s2train.evaluation.tasks import load_tasks, metrics, run_tasks
from s2train.evaluation.windows import Window
from tests.program import pretrain, run

pytest.importorskip("lm_eval")

from s2train.evaluation import harness

QUESTIONS = [
    {"question": "2 + 2 =", "answer": " 4", "wrong": " 9", "label": 0},
    {"question": "1 + 1 =", "answer": " 9", "wrong": " 2", "label": 0},
]
DATA = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {path}\ntest_split: test\n"
CHOICE = """task: own_choice
{data}output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{[answer, wrong]}}}}"
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
"""
ROLLING = """task: own_rolling
{data}output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: bits_per_byte
"""
WRITING = """task: own_writing
{data}output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local tasks, with their questions beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("writing", WRITING)):
        (folder / f"{name}.yaml").write_text(text.format(data=DATA.format(path=questions)))
    return folder


class Counter:
    """A model whose loss on a byte is a hundredth of it, and to which digits below 5 are the likeliest.

    It writes the following bytes, and ends after `stop`.
    """

    gpt, device, chunk = None, torch.device("cpu"), 16

    def __call__(self, windows: Sequence[Window]) -> tuple[Tensor, Tensor, Tensor]:
        longest = max(len(window.tokens) for window in windows)
        targets, counted = torch.zeros(len(windows), longest), torch.zeros(len(windows), longest, dtype=torch.bool)
        for row, window in enumerate(windows):
            targets[row, : len(window.targets)] = torch.from_numpy(window.targets).float()
            counted[row, window.first : len(window.targets)] = True
        return targets / 100, targets < ord("5"), counted


def written(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace the generation by one that counts up from the prompt's last byte; returns its calls."""
    calls = []

    def stream(gpt: Any, prompts: Tensor, count: int, *, lengths: Tensor, eod: int, **others: Any) -> Iterator[Tensor]:
        calls.append({"prompts": prompts, "lengths": lengths.tolist(), "count": count, **others})
        last = prompts.gather(1, lengths[:, None] - 1).squeeze(1)
        for step in range(1, count + 1):
            yield torch.where(last + step > ord("h"), eod, last + step)

    monkeypatch.setattr(harness, "stream", stream)
    return calls


def model(length: int = 64) -> harness.CachedLM:
    return harness.CachedLM(Counter(), ByteTokenizer(), length, batch_size=2, seed=1)  # type: ignore[arg-type]


def asked(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=one, task_name="own") for one in arguments]


def test_a_continuation_has_the_sum_of_its_tokens() -> None:
    found = model().loglikelihood(asked(("Question", " 4"), ("", "ab"), ("Q", "12")), disable_tqdm=True)
    expected = [(-(32 + 52) / 100, True), (-(97 + 98) / 100, False), (-(49 + 50) / 100, True)]
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected])
    assert [one for _, one in found] == [one for _, one in expected]


def test_a_context_that_is_too_long_loses_its_beginning() -> None:
    ((found, _),) = model(8).loglikelihood(asked(("x" * 100, "ab")), disable_tqdm=True)
    assert found == pytest.approx(-(97 + 98) / 100)
    with pytest.raises(ConfigError, match=r"^length=8: a continuation of 9 tokens"):
        model(8).loglikelihood(asked(("x", "a" * 9)), disable_tqdm=True)


def test_a_whole_text_is_summed_over_its_windows() -> None:
    text = "The rabbit ran on and on."
    found = model(7).loglikelihood_rolling(asked((text,), ("ab",)), disable_tqdm=True)
    assert found == pytest.approx([-sum(text.encode()) / 100, -(97 + 98) / 100])


def test_text_ends_before_a_stop_and_at_the_end_token(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = written(monkeypatch)
    settings = {"until": ["de"], "max_gen_toks": 5}
    requests = asked(
        ("a", settings), ("xd", settings), ("longer e", {"until": "g", "max_gen_toks": 2}), ("A", settings)
    )
    assert model().generate_until(requests) == ["bc", "efgh", "f", "BCDEF"]
    assert sorted((call["count"], call["lengths"]) for call in calls) == [(2, [8]), (5, [1]), (5, [2, 1])]


def test_a_question_leaves_room_for_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = written(monkeypatch)
    model(10).generate_until(asked(("x" * 50, {"max_gen_toks": 4})))
    assert calls[0]["lengths"] == [6]
    with pytest.raises(ConfigError, match=r"^length=10: the task own generates up to 10 tokens"):
        model(10).generate_until(asked(("x", {"max_gen_toks": 10})))


def test_a_way_of_generating_that_is_not_supported_is_rejected() -> None:
    with pytest.raises(ConfigError, match="num_beams"):
        model().generate_until(asked(("x", {"num_beams": 4})))


@pytest.mark.parametrize("until", ["", ["b", ""]])
def test_an_empty_stop_text_is_rejected(until: str | list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^tasks=own: the task stops at an empty text"):
        model().generate_until(asked(("x", {"until": until})))


@pytest.mark.slow
def test_local_tasks_are_scored_by_the_harness(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    written(monkeypatch)
    cfg = EvaluateConfig("runs/x", tasks=["own_choice", "own_rolling", "own_writing"], task_folder=str(folder))
    found = metrics(run_tasks(cfg, load_tasks(cfg, 64), Counter(), ByteTokenizer(), 64))  # type: ignore[arg-type]
    assert found["own_choice"]["acc"] == 0.5  # 4 is less than 9, and 2 is
    count, total = (sum(f(one["question"].encode()) for one in QUESTIONS) for f in (len, sum))
    assert found["own_rolling"]["bits_per_byte"] == pytest.approx(total / 100 / count / 0.6931471805599453)
    assert found["own_writing"]["exact_match"] == 0.0
    with pytest.raises(ConfigError, match=r"^tasks=own_choise: no such task. Did you mean own_choice"):
        load_tasks(EvaluateConfig("runs/x", tasks=["own_choise"], task_folder=str(folder)), 64)
    with pytest.raises(ConfigError, match=r"^length=8: the task own_writing generates up to 8 tokens"):
        load_tasks(cfg, 8)  # before the model is loaded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "fewshot", "problem", "remedy"),
    [
        ("fewshot_split: test\n", 2, "would take 2 examples, and has 1", "Set fewshot=1 or less"),
        ("fewshot_split: test\nnum_fewshot: 2\n", None, "would take 2 examples, and has 1", "Set fewshot=1 or less"),
        ("", 3, "would take 3 examples, and has 2", "Set fewshot=2 or less"),
        ("num_fewshot: 0\n", 1, "takes no examples", "Leave fewshot out"),
    ],
)
def test_examples_that_a_task_lacks_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, fewshot: int | None, problem: str, remedy: str
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    data = DATA.format(path=tmp_path / "questions.jsonl") + lines
    (tmp_path / "choice.yaml").write_text(CHOICE.format(data=data))
    cfg = EvaluateConfig("runs/x", tasks=["own_choice"], task_folder=str(tmp_path), fewshot=fewshot)
    with pytest.raises(ConfigError, match=rf"^fewshot={fewshot}: the task own_choice {problem}.* {remedy}"):
        load_tasks(cfg, 64)


@pytest.mark.slow
def test_the_program_evaluates_a_checkpoint_on_a_task(folder: Path, tmp_path: Path) -> None:
    pretrain(tmp_path / "run", "train.steps=2", "optim.warmup_steps=1", processes=0).succeeded()
    settings = [f"checkpoint={tmp_path / 'run'}", "tasks=[own_choice,own_writing]", f"task_folder={folder}"]
    results = []
    for processes in (0, 2):
        output = tmp_path / f"{processes}.json"
        done = run(
            "evaluate.py", *settings, f"output={output}", f"tp={processes or 1}", processes=processes, timeout=900
        ).succeeded()
        assert "own_choice: acc " in done.out
        results.append(metrics(json.loads(output.read_text())["tasks"]))
    assert results[0] == results[1]
