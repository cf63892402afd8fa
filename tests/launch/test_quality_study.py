"""launch/quality_study.py makes data, trains, probes and reports, and does nothing twice."""

import json
import runpy
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from s2train.checkpoints.folders import Progress, write_config
from s2train.data.indexed import Metadata
from s2train.data.tokenizers import fingerprint
from s2train.errors import ConfigError
from s2train.files import write_json
from s2train.planning import compose_run
from s2train.study import settings, sweep
from s2train.study.files import Folders
from s2train.study.settings import Recipe, train_settings
from s2train.study.variants import PHASES, RUNS, VARIANTS, Phase, Run
from tests.probes.source_text import source
from tests.program import AWKWARD_NAME, run

ROOT = Path(__file__).parents[2]
SMALL = [
    "model.num_layers=4",
    "model.hidden_size=48",
    "model.ffn_hidden_size=32",
    "model.vocab_size=512",
    "train.precision=fp32",
    "data.num_workers=0",
    "tracking.wandb=disabled",
]
SMALL_HYPER = [
    f"layout.kinds.H.{name}={value}"
    for name, value in {
        "bucket": 16,
        "samples": 16,
        "projections": 6,
        "shortest": 64,
        "window": 16,
        "sinks": 16,
    }.items()
]


@pytest.fixture(scope="module")
def study() -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "launch")
        yield runpy.run_path(str(ROOT / "launch" / "quality_study.py"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Six subsystems of three files."""
    for number in range(18):
        folder = tmp_path / "tree" / "fs" / f"part{number // 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"file{number % 3}.c").write_text(source(number, 60, 6))
    return tmp_path / "tree"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], "train takes one variant or more"),
        (["report", "hybrid"], "report takes no variant"),
        (["plan", "seed=2"], "plan takes no settings"),
        (["train", "hybrid", "--lr", "1e-3"], "--lr and --batch-tokens belong together"),
        (["report", "--shared-gpu"], "report takes no --shared-gpu"),
        (["report", "--phase", "32k"], "report takes no --phase"),
        (["plan", "--seed", "2"], "plan takes no --seed"),
        (["sweep", "--lr", "1e-3", "--batch-tokens", "16384"], "sweep takes no --lr"),
        (["train", "hybrid", "--device", "h200"], "train takes no --device"),
        (["train", "hybrid", "--tree", "linux"], "train takes no --tree"),
        (["train", "hybrid", "--minutes", "0.5"], "0.5 is too short to start anything"),
        (["train", "hybrid", "--minutes", "nan"], "nan is too short to start anything"),
        (["train", "hybrid", "--gpu", "0,"], "names a device twice, or an empty one"),
        (["train", "hybrid", "--gpu", "0,0"], "names a device twice, or an empty one"),
    ],
)
def test_arguments_that_an_action_would_not_use_are_rejected(
    study: dict[str, Any], arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        study["main"](arguments)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "widow", "--lr", "1e-3", "--batch-tokens", "1024"], "Did you mean window?"),
        (["train", "hybrid"], "lacks 4 of 4 trials"),
        (["train", "hybrid", "--phase", "16k-40m"], "has another model than the sweep"),
        (["plan", "--phase", "16k-40m"], "has another model than the sweep"),
        (["plan", "--phase", "17k"], "Did you mean"),
        (["plan", "--phase", "64k", "--gpu", "0,1,2"], "a step of phase 64k has 2 sequences"),
        (["speed", "hybrid", "--gpu", "0,1,2", "--lr", "1e-3", "--batch-tokens", "131072"], "such as 2"),
        (["sweep", "--gpu", "0,1,2"], "a step of phase 16k has 8 sequences"),
        (["plan", "--lr", "nan", "--batch-tokens", "131072"], "--lr=nan: is no learning rate above 0"),
        (["train", "hybrid", "--lr", "1e-3", "--batch-tokens", "131072"], "quality_study.py data --tree"),
        (["train", "hybrid", "--lr", "1e-3", "--batch-tokens", "1024"], "whole sequences, of 16,384 tokens"),
        (["plan", "--phase", "16k", "--lr", "1e-3", "--batch-tokens", "0"], "Set 16384"),
        (["evaluate", "hybrid"], "quality_study.py data --tree"),
        (["data"], "quality_study.py data --tree"),
        (["report"], "holds no results"),
    ],
)
def test_what_is_missing_is_named_in_one_error(
    study: dict[str, Any], arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        study["main"]([*arguments, "--root", str(tmp_path)])
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


@pytest.mark.parametrize("action", [["data"], ["sweep"], ["speed", "hybrid"], ["evaluate", "hybrid"], ["report"]])
def test_a_root_that_can_not_be_written_is_rejected_first(
    study: dict[str, Any], action: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        study["main"]([*action, "--root", "/proc/study"])
    assert capsys.readouterr().err.startswith("error: root=/proc/study: /proc can't be written")


@pytest.mark.parametrize("recipe", [[], ["--lr", "1e-3", "--batch-tokens", "131072"]])
def test_a_plan_says_whether_its_learning_rate_was_chosen(
    study: dict[str, Any], recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study["main"](["plan", "--phase", "64k", *recipe, "--root", str(tmp_path)])
    assert ("the sweep has yet to choose lr" in capsys.readouterr().out) is (not recipe)


def test_a_plan_of_the_rehearsal_lists_its_runs(
    study: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study["main"](["plan", "--phase", "rehearsal", "--lr", "3e-3", "--batch-tokens", "2048", "--root", str(tmp_path)])
    assert "hybrid-rehearsal-seed1" in capsys.readouterr().out


@pytest.fixture
def with_corpus(tmp_path: Path) -> Path:
    """A root whose corpus holds out b of a tree."""
    for split in ("train", "held-out"):
        write_json(tmp_path / "corpus" / f"{split}.jsonl", {"text": "a"})
    made = {"tree": "tree", "held_out": ["b"], "depth": 1, "workers": 8}
    write_json(tmp_path / "corpus" / "corpus.json", {"settings": made})
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["held_out=[a]"], "held_out=[a]: {root}/corpus was made with held_out=[b]. Leave it out"),
        (["--tree", "tree", "depth=2"], "depth=2: {root}/corpus was made with depth=1"),
        (["--tree", "another"], "--tree=another: {root}/corpus was made of tree"),
        (["overwrite=true"], "delete {root}/corpus and {root}/data"),
        (["held_uot=[a]"], "Did you mean held_out?"),
    ],
)
def test_settings_that_the_corpus_was_not_made_with_are_rejected(
    study: dict[str, Any],
    arguments: list[str],
    words: str,
    with_corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["data", *arguments, "--root", str(with_corpus)]
    monkeypatch.setattr("sys.argv", ["quality_study.py", *command])
    with pytest.raises(SystemExit):
        study["main"](command)
    assert words.format(root=with_corpus) in capsys.readouterr().err


def test_the_settings_of_the_corpus_may_be_given_again(
    study: dict[str, Any], with_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = list[str]()
    monkeypatch.setattr(study["Deadline"], "run", lambda self, command: started.append(Path(command[0]).name))
    study["main"](["data", "--tree", "tree", "held_out=[b]", "workers=2", "--root", str(with_corpus)])
    assert started == ["prepare_data.py"] * 2


def test_probing_an_untrained_run_names_the_command_that_trains_it(
    study: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "held-out.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(SystemExit):
        study["main"](["evaluate", "hybrid", "--phase", "16k-40m", "--seed", "2", "--root", str(tmp_path)])
    assert f"train hybrid --phase 16k-40m --seed 2 --root {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["task=[single]", "output=elsewhere", "checkpoint=another", "text=another"])
def test_an_evaluation_takes_no_tasks_or_folders_whose_earlier_cells_would_join_the_result(
    study: dict[str, Any], setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(Folders(tmp_path, ROOT / "launch").result(Run("hybrid", "16k-needles")), {})
    with pytest.raises(SystemExit):
        study["main"](["evaluate", "hybrid", "--phase", "16k-needles", setting, "--root", str(tmp_path)])
    assert f"error: {setting}: the study sets it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.exit_step=2", "the study sets it"),
        ("train.steps=2", "the study sets it"),
        ("seed=7", "the study sets it"),
        ("layout.block_size=128", "the study sets it"),
        ("schedule.dense_heads=1", "the study sets it"),
        ("run_dir=elsewhere", "the study sets it"),
        ("++evaluation.batches=1", "the study sets it"),
        ("evaluation.interval=0", "the held-out loss is a run's result"),
    ],
)
@pytest.mark.parametrize("action", [["train", "dense", "--phase", "64k"], ["sweep"]])
def test_a_run_takes_no_settings_that_make_it_another_than_its_name_says(
    study: dict[str, Any],
    action: list[str],
    setting: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(study["run_sweep"].__globals__, "check_data", lambda _: None)
    recipe = [] if action == ["sweep"] else ["--lr", "1e-3", "--batch-tokens", "131072"]
    with pytest.raises(SystemExit):
        study["main"]([*action, setting, *recipe, "--root", str(tmp_path)])
    assert f"error: {setting.lstrip('+')}: {words}" in capsys.readouterr().err


def test_a_run_takes_settings_of_logs_and_evaluations() -> None:
    own = train_settings(Folders(Path("root"), ROOT / "launch"), Run("hybrid", "64k"), Recipe(1e-3, 1 << 17))
    settings.check_given(own, ["evaluation.interval=5", "tracking.wandb=auto", "train.micro_batch_size=1"])


def test_a_run_whose_start_had_another_batch_is_not_called_untrained(
    study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(study["train"].__globals__, "check_data", lambda _: None)
    folders, needles = Folders(tmp_path, ROOT / "launch"), Run("dense", "16k-needles")
    with pytest.raises(ConfigError, match="which is not trained here"):
        study["train"](folders, needles, Recipe(1e-3, 1 << 18), 1, [], None)
    study["last_checkpoint"](folders, Run("dense"), Recipe(1e-3, 1 << 17)).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"only iter_0002289 is there.*or set the --batch-tokens"):
        study["train"](folders, needles, Recipe(1e-3, 1 << 18), 1, [], None)


@pytest.mark.parametrize("action", [["train", "dense", "--phase", "16k-needles"], ["evaluate", "dense"]])
def test_a_result_whose_weights_are_elsewhere_is_not_called_untrained(
    study: dict[str, Any],
    action: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("check_data", "check_held_out", "check_same_split"):
        monkeypatch.setitem(study["train"].__globals__, name, lambda _: None)
    folders = Folders(tmp_path, ROOT / "launch")
    write_json(folders.result(Run("dense")), {"recipe": {"lr": 1e-3, "batch_tokens": 1 << 17}})
    with pytest.raises(SystemExit):
        study["main"]([*action, "--root", str(tmp_path), "--lr", "1e-3", "--batch-tokens", str(1 << 17)])
    error = capsys.readouterr().err
    assert "the result of dense-16k-seed1 is here, and its weights are not. Copy " in error
    assert "dense-16k-seed1.json, and its probes and needles" in error  # which would be of other weights
    assert error.count("error: ") == 1


def test_a_trained_run_is_not_recorded_under_another_recipe_or_number_of_gpus(
    study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("check_data", "damage"):
        monkeypatch.setitem(study["train"].__globals__, name, lambda _: None)
    folders, trained = Folders(tmp_path, ROOT / "launch"), Run("dense")
    recipe = Recipe(1e-3, 1 << 17)
    checkpoint = study["last_checkpoint"](folders, trained, recipe)
    checkpoint.mkdir(parents=True)
    Progress(1, 1, {}, None).write(checkpoint / "progress.json")
    write_config(compose_run(train_settings(folders, trained, recipe)), folders.run(trained) / "config.yaml")
    report = {"step": 1, "loss": 1.0, "held_out_loss": 2.0, "held_out_loss_by_position": [], "consumed_tokens": 1}
    times = {"step_time_s": 1.0, "tokens_per_s": 1.0, "model_tflops": 1.0, "memory_gib": 1.0}
    begun = {"event": "config", "processes": 1}
    (folders.run(trained) / "metrics.jsonl").write_text(f"{json.dumps(begun)}\n{json.dumps(report | times)}\n")
    with pytest.raises(ConfigError, match=r"was trained with optim\.lr=0\.001"):
        study["train"](folders, trained, Recipe(2e-3, 1 << 17), 1, [], None)
    with pytest.raises(ConfigError, match=r"was trained with optim\.weight_decay="):
        study["train"](folders, trained, recipe, 1, ["optim.weight_decay=0.3"], None)
    with pytest.raises(ConfigError, match=r"--gpu=2 devices: dense-16k-seed1 was trained on 1 .*add --shared-gpu"):
        study["train"](folders, trained, recipe, 2, [], None)
    assert not folders.result(trained).exists()
    study["train"](folders, trained, recipe, 1, ["data.num_workers=7"], None)  # which changes no result
    assert json.loads(folders.result(trained).read_text())["recipe"]["lr"] == recipe.lr


@pytest.mark.parametrize(("first_is_saved", "is_shared"), [(True, True), (False, False)])
def test_a_run_that_resumes_a_start_on_a_shared_gpu_counts_as_shared(
    first_is_saved: bool, is_shared: bool, study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("check_data", "damage"):
        monkeypatch.setitem(study["train"].__globals__, name, lambda _: None)
    folders, trained, recipe = Folders(tmp_path, ROOT / "launch"), Run("dense"), Recipe(1e-3, 1 << 17)
    last = study["last_checkpoint"](folders, trained, recipe)
    times = {"step_time_s": 1.0, "tokens_per_s": 1.0, "model_tflops": 1.0, "memory_gib": 1.0}
    report = {"step": 1, "loss": 1.0, "held_out_loss": 2.0, "held_out_loss_by_position": [], "consumed_tokens": 1}

    class Interrupted:
        def run(self, command: list[str], record: Path) -> None:
            folders.run(trained).mkdir(parents=True, exist_ok=True)
            if first_is_saved:
                last.with_name("iter_0000001").mkdir(parents=True)
            (folders.run(trained) / "metrics.jsonl").write_text(json.dumps(report | times))
            raise SystemExit

    class Finished:
        def run(self, command: list[str], record: Path) -> None:
            last.mkdir(parents=True)

    with pytest.raises(SystemExit):
        study["train"](folders, trained, recipe, 1, [], Interrupted(), shared_gpu=True)
    study["train"](folders, trained, recipe, 1, [], Finished())
    assert json.loads(folders.result(trained).read_text())["shared_gpu"] == is_shared


@pytest.mark.parametrize(
    ("visible", "given", "used"),
    [(None, [], "0"), ("3,4", [], "3"), ("3,4", ["--gpu", "4"], "4"), ("", [], ""), (None, ["--gpu", ""], "")],
)
def test_a_run_takes_the_first_visible_device(
    study: dict[str, Any],
    visible: str | None,
    given: list[str],
    used: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    devices: list[str] = []

    def start(minutes: float, environment: dict[str, str]) -> None:
        devices.append(environment["CUDA_VISIBLE_DEVICES"])

    monkeypatch.setitem(study["main"].__globals__, "Deadline", start)
    write_json(tmp_path / "results" / "dense-16k-seed1-probes.json", {})
    study["main"](["evaluate", "dense", "--root", str(tmp_path), *given])
    assert devices == [used]


def test_a_result_of_another_recipe_is_not_taken_for_the_run(study: dict[str, Any], tmp_path: Path) -> None:
    folders, trained = Folders(tmp_path, ROOT / "launch"), Run("dense")
    write_json(folders.result(trained), {"recipe": {"lr": 6e-4, "batch_tokens": 1 << 17}})
    study["train"](folders, trained, Recipe(6e-4, 1 << 17), 1, [], None)
    with pytest.raises(ConfigError, match=r"--lr=0\.001: .*is of a run with 0\.0006\. Give its --lr 0\.0006 "):
        study["train"](folders, trained, Recipe(1e-3, 1 << 17), 1, [], None)
    with pytest.raises(ConfigError, match=r"--batch-tokens=262144: .*is of a run with 131072"):
        study["train"](folders, trained, Recipe(6e-4, 1 << 18), 1, [], None)


def test_a_result_of_other_texts_is_not_taken_for_the_run(study: dict[str, Any], tmp_path: Path) -> None:
    folders, trained, recipe = Folders(tmp_path, ROOT / "launch"), Run("dense"), Recipe(6e-4, 1 << 17)
    folders.data.mkdir()
    for split in ("train", "held-out"):
        Metadata("name", "print", 257, 9, 1, 1.0, {"text": split}).write(folders.data / f"{split}.json")
    texts = {"train": "train", "held-out": "held-out", "tokenizer": "print"}
    for known in ({}, {"texts": None}, {"texts": texts}):
        write_json(folders.result(trained), {"recipe": {"lr": 6e-4, "batch_tokens": 1 << 17}, **known})
        study["train"](folders, trained, recipe, 1, [], None)
    write_json(
        folders.result(trained), {"recipe": {"lr": 6e-4, "batch_tokens": 1 << 17}, "texts": texts | {"train": "x"}}
    )
    with pytest.raises(ConfigError, match=r"dense-16k-seed1\.json is of a run on other texts than those in .*/data"):
        study["train"](folders, trained, recipe, 1, [], None)


def test_runs_that_start_together_make_their_documents_once(study: dict[str, Any], tmp_path: Path) -> None:
    folders, made = Folders(tmp_path, ROOT / "launch"), list[str]()
    folders.data.mkdir()
    folders.tokenizer.write_text("a tokenizer")

    class Slow:
        def run(self, command: list[str]) -> None:
            made.append(output := command[1].removeprefix("output="))
            time.sleep(0.1)
            Metadata("name", str(fingerprint(str(folders.tokenizer))), 257, 9999, 1, 1.0, {}).write(
                Path(f"{output}.json")
            )
            Path(f"{output}.idx").touch()

    recipe = Recipe(1e-3, 1 << 17)
    with ThreadPoolExecutor(2) as pool:
        runs = [Run(variant, "16k-needles") for variant in ("dense", "hybrid")]
        list(pool.map(lambda own: study["make_documents"](folders, own, recipe, Slow()), runs))
    assert sorted(Path(one).name for one in made) == ["needles-16384-lines", "needles-16384-noise"]


@pytest.fixture
def started(study: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Programs that an action started, in this process."""
    programs: list[str] = []

    def start(self: object, command: list[str], record: Path | None = None) -> None:
        program, *arguments = command
        programs.append(Path(program).name)
        run(Path(program).name, *arguments, processes=0).succeeded()

    monkeypatch.setattr(study["Deadline"], "run", start)
    return programs


@pytest.mark.slow
def test_a_small_study_goes_from_a_tree_to_a_report(
    study: dict[str, Any], started: list[str], tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, length, steps in (("16k", 256, 4), ("32k", 512, 4), ("64k", 512, 2), ("16k-needles", 512, 2)):
        small = replace(PHASES[name], length=length, tokens=steps * 512, held_out_tokens=1024)
        monkeypatch.setitem(PHASES, name, small)
    monkeypatch.setattr(sweep, "GRID", (Recipe(1e-3, 512), Recipe(2e-3, 512)))
    monkeypatch.setattr(sweep, "TOKENS", 2 * 512)
    monkeypatch.setattr(settings, "VOCABULARY", 512)
    root = tmp_path / AWKWARD_NAME

    def act(*arguments: str) -> None:
        started.clear()
        study["main"]([*arguments, "--root", str(root)])

    def act_twice(*arguments: str, programs: list[str]) -> None:
        act(*arguments)
        assert started == programs
        act(*arguments)
        assert started == []

    made = ["make_corpus.py", "prepare_data.py", "prepare_data.py"]
    act_twice("data", "--tree", str(tree), "held_out=[fs/part5]", programs=made)
    act_twice("sweep", *SMALL, programs=["pretrain.py"] * 2)
    act_twice("speed", "hybrid", *SMALL, programs=["pretrain.py"])
    act_twice("train", "hybrid", "window", *SMALL, programs=["pretrain.py"] * 2)
    (root / "corpus" / "train.jsonl").unlink()  # it need not be on the machine that trains and evaluates
    act_twice("evaluate", "hybrid", "window", "trials=5", programs=["probes.py"] * 2)
    act_twice("train", "window", "--phase", "32k", *SMALL, programs=["pretrain.py"])
    act_twice("train", "window", "--phase", "64k", *SMALL, programs=["pretrain.py"])
    made = ["prepare_data.py", "prepare_data.py", "pretrain.py"]
    act_twice("train", "window", "--phase", "16k-needles", *SMALL, programs=made)
    act_twice("evaluate", "window", "--phase", "16k-needles", "depths=[0.5]", "trials=2", programs=["needle.py"])
    act("report")
    report = (root / "quality.md").read_text()
    assert report.count("\n| hybrid | 1 |") == 1
    assert report.count("\n| window | 1 |") == 4
    assert "key_value at 512" in report
    assert (root / "quality.png").is_file()
    results = json.loads((root / "results" / "window-64k-seed1.json").read_text())
    assert results["density"] == 1
    probed = json.loads((root / "results" / "hybrid-16k-seed1-probes.json").read_text())
    assert [row["length"] for row in probed["completion"]] == [256]


@pytest.mark.long
def test_every_kind_of_the_tier_trains_and_some_start_from_dense_weights(
    study: dict[str, Any], started: list[str], tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = (
        "+model=125m_hybrid",
        "model.num_attention_heads=8",
        "model.num_query_groups=4",
        *SMALL,
        "model.hidden_size=64",
    )
    tier = Phase("16k-40m", 2048, 3 * 2048, model=model, held_out_tokens=2048, scorer_warm_up=1)
    for phase in (tier, replace(tier, name="16k-40m-from-dense", after="16k-40m", from_dense=True)):
        monkeypatch.setitem(PHASES, phase.name, phase)
    monkeypatch.setattr(settings, "VOCABULARY", 512)
    monkeypatch.setitem(VARIANTS, "hyper", ("layout=hyper_b256", "layout.layers=DHHH", *SMALL_HYPER))
    root = ["--root", str(tmp_path / "study")]
    study["main"](["data", "--tree", str(tree), "held_out=[fs/part5]", *root])
    started.clear()
    recipe = ["--lr", "1e-3", "--batch-tokens", "2048", "--shared-gpu"]
    kinds = [run.variant for run in RUNS if run.phase == "16k-40m" and run.seed == 1]
    study["main"](["train", *kinds, "--phase", "16k-40m", *recipe, *root])
    study["main"](["train", "dense", "index", "hyper", "--phase", "16k-40m-from-dense", *recipe, *root])
    assert started == ["pretrain.py"] * 11
    study["main"](["report", *root])
    report = (tmp_path / "study" / "quality.md").read_text()
    for kind in kinds:
        content = json.loads((tmp_path / "study" / "results" / f"{kind}-16k-40m-seed1.json").read_text())
        assert content["shared_gpu"]
        assert bool(content["recall"]) == (kind in ("moba", "index", "sea"))
        assert f"| {kind} | 1 | 1 | {content['density']:.4f}{' expected' if kind == 'hyper' else ''} |" in report
    for kind in ("dense", "index", "hyper"):
        records = (tmp_path / "study" / "runs" / f"{kind}-16k-40m-from-dense-seed1" / "metrics.jsonl").read_text()
        assert [json.loads(line)["step"] for line in records.splitlines() if "held_out_loss" in line] == [1, 2, 3]
