"""A run learns from a dense checkpoint: which one it takes, what it rejects, and that it trains and resumes alike."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint import FileSystemReader

from s2train.checkpoints.architecture import check_same_architecture
from s2train.checkpoints.folders import write_config
from s2train.checkpoints.setting_changes import changes_between, check_allowed
from s2train.checkpoints.teacher import find_teacher, with_teacher
from s2train.config import PretrainConfig
from s2train.data.tokenizers import ByteTokenizer, train_bpe
from s2train.errors import ConfigError
from s2train.planning import compose_run
from tests.program import SMALL, UNSAVED, error_line, metrics, pretrain

TOLERANCE = 1e-5  # of another division, in fp32
NAMES = ("loss", "grad_norm", *(f"block_selection_{name}_by_layer" for name in ("kl", "mse", "recall")))
STUDENT = ["layout.layers=DEEE", "train.steps=3", "checkpoint.interval=2"]


def kind(teacher: Path | str | None) -> str:
    given = "null" if teacher is None else teacher
    own = "scorer:sea,features:8,channels:4,top_k:1,warm_up_steps:2,sampled_rows:8"
    return f"+layout.kinds.E={{kind:block_selection,{own},teacher:{given}}}"


def student_of(teacher: Path | str | None, *settings: str) -> PretrainConfig:
    return compose_run([*SMALL, *STUDENT, kind(teacher), *settings])


def saved(folder: Path, *settings: str, step: int = 1) -> Path:
    """A run folder whose checkpoint has settings alone."""
    checkpoint = folder / "checkpoints" / f"iter_{step:07}"
    checkpoint.mkdir(parents=True)
    write_config(compose_run([*SMALL, "layout.layers=D", *settings]), checkpoint / "config.yaml")
    return folder


def rejected(folder: Path) -> str:
    with pytest.raises(ConfigError) as raised:
        find_teacher(student_of(folder), ByteTokenizer())
    assert raised.value.setting == "layout.kinds.E.teacher"
    return raised.value.problem


def test_a_run_without_a_teacher_finds_none() -> None:
    assert find_teacher(student_of(None), ByteTokenizer()) is None


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("model.num_layers=2", "has model.num_layers=2, and this run has 4"),
        ("model.num_attention_heads=8", "has model.num_attention_heads=8, and this run has 4"),
        ("model.num_query_groups=4", "has model.num_query_groups=4, and this run has 2"),
        ("model.head_dim=32", "has model.head_dim=32, and this run has 16"),
        ("model.hidden_size=128", "has model.hidden_size=128, and this run has 64"),
        ("model.vocab_size=512", "has model.vocab_size=512, and this run has 272"),
        ("model.rotary_base=5000", "has model.rotary_base=5000, and this run has 10000"),
        ("model.rope_scaling={kind:linear,factor:4}", "has model.rope_scaling.kind=linear, and this run has none"),
        ("layout.layers=DSSS", "isn't dense: its layout.layers is DSSS"),
    ],
)
def test_a_teacher_of_another_shape_is_rejected(setting: str, problem: str, tmp_path: Path) -> None:
    extra = ["model.head_dim=16"] if "num_attention_heads" in setting or "hidden_size" in setting else []
    assert problem in rejected(saved(tmp_path, setting, *extra))


def test_a_teacher_of_another_tokenizer_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    folder = saved(tmp_path, f"data.tokenizer={path}")
    assert rejected(folder).endswith(f"and this run has bytes; {path} is missing, so they can't be compared")
    train_bpe(["a text"], 270, path)
    assert rejected(folder).endswith(f"was trained with the tokenizer {path}, and this run has bytes")


def test_a_missing_folder_is_rejected(tmp_path: Path) -> None:
    assert rejected(tmp_path / "nowhere") == "no checkpoint there"


def test_a_damaged_teacher_is_rejected(tmp_path: Path) -> None:
    assert "missing" in rejected(saved(tmp_path))


def test_a_run_is_rejected_before_it_writes_anything(tmp_path: Path) -> None:
    line = error_line(pretrain(tmp_path / "run", *STUDENT, kind(tmp_path / "nowhere"), processes=0))
    assert line.startswith(f"error: layout.kinds.E.teacher={tmp_path / 'nowhere'}: no checkpoint there")
    assert not (tmp_path / "run").exists()


def test_the_settings_name_the_checkpoint_in_place_of_the_run() -> None:
    cfg = with_teacher(student_of("runs/dense"), Path("runs/dense/checkpoints/iter_0000003"))
    assert cfg.layout.kinds["E"]["teacher"] == "runs/dense/checkpoints/iter_0000003"
    assert with_teacher(student_of(None), None) == student_of(None)


def test_another_teacher_is_a_change_that_a_resumed_run_must_allow() -> None:
    checkpoint = Path("runs/a/checkpoints/iter_0000002")
    before, now = (student_of(f"runs/dense/checkpoints/iter_000000{step}") for step in (1, 2))
    changes = changes_between(before, now)
    (change,) = map(str, changes)
    assert change == (
        "layout.kinds.E.teacher runs/dense/checkpoints/iter_0000001 → runs/dense/checkpoints/iter_0000002"
    )
    check_same_architecture(changes, checkpoint, may_change={"layout.kinds.E.teacher"})
    with pytest.raises(ConfigError, match=r"layout.kinds.E.teacher=.*was trained with other settings"):
        check_allowed(now, checkpoint, changes)
    allowing = replace(now.checkpoint, allow_changes=["layout.kinds.E.teacher"])
    check_allowed(replace(now, checkpoint=allowing), checkpoint, changes)


def values(run_dir: Path) -> list[Any]:
    return [[record[name] for name in NAMES] for record in metrics(run_dir)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    pretrain(folder, "layout.layers=D", "train.steps=4", "checkpoint.interval=2").succeeded()
    return folder


@pytest.fixture(scope="module")
def taught(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taught")
    done = pretrain(folder, *STUDENT, kind(dense)).succeeded()
    named = f"teacher of layers E: the dense model of {dense}/checkpoints/iter_0000004"
    assert named in done.out
    return folder


def resumed(run_dir: Path) -> str:
    return f"checkpoint.resume={run_dir / 'checkpoints' / 'iter_0000002'}"


@pytest.mark.slow
def test_the_models_own_dense_checkpoint_teaches_as_its_own_attention(dense: Path, tmp_path: Path) -> None:
    start = [
        *STUDENT,
        f"checkpoint.resume={dense}",
        "checkpoint.weights_only=true",
        "train.freeze_trunk_steps=2",
        "optim.trunk_warmup_steps=1",
        UNSAVED,
    ]
    for name, teacher in (("own", None), ("taught", dense)):
        pretrain(tmp_path / name, *start, kind(teacher), "train.exit_step=2").succeeded()
    assert values(tmp_path / "taught") == values(tmp_path / "own")
    assert len(values(tmp_path / "own")) == 2


@pytest.mark.slow
def test_a_resumed_run_learns_bit_for_bit_from_the_same_checkpoint(dense: Path, taught: Path, tmp_path: Path) -> None:
    pretrain(tmp_path, *STUDENT, kind(dense), resumed(taught), UNSAVED).succeeded()
    assert values(tmp_path) == values(taught)[2:]


@pytest.mark.slow
def test_another_teacher_on_resume_is_logged(dense: Path, taught: Path, tmp_path: Path) -> None:
    first, second = (dense / "checkpoints" / f"iter_000000{step}" for step in (4, 2))
    changed = [kind(second), "checkpoint.allow_changes=true", UNSAVED]
    done = pretrain(tmp_path, *STUDENT, *changed, resumed(taught)).succeeded()
    assert f"layout.kinds.E.teacher {first} → {second}" in done.out
    assert f"teacher of layers E: the dense model of {second}" in done.out


@pytest.mark.slow
def test_a_checkpoint_holds_nothing_of_the_teacher(taught: Path) -> None:
    def shapes(run_dir: Path) -> dict[str, Any]:
        index = FileSystemReader(run_dir / "checkpoints" / "iter_0000002").read_metadata()
        return {name: getattr(value, "size", None) for name, value in index.state_dict_metadata.items()}

    pretrain(taught.parent / "untaught", *STUDENT, kind(None), "train.exit_step=2").succeeded()
    assert shapes(taught) == shapes(taught.parent / "untaught")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "division"),
    [
        (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
        (2, ["parallel.distributed_optimizer=true", "train.recompute=full", "train.micro_batch_size=2"]),
    ],
    ids=["tensor and sequence parallel", "data parallel, recomputed"],
)
def test_several_ranks_learn_alike(
    dense: Path, taught: Path, processes: int, division: list[str], tmp_path: Path
) -> None:
    pretrain(tmp_path, *STUDENT, kind(dense), *division, UNSAVED, processes=processes).succeeded()
    for now, expected in zip(values(tmp_path), values(taught), strict=True):
        for name, one, other in zip(NAMES, now, expected, strict=True):
            assert one == pytest.approx(other, rel=TOLERANCE, abs=1e-8), name
