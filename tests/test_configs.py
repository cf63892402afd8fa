"""Every configuration in conf/ composes, and misspelt names are rejected before anything runs."""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from s2train.checkpoints.setting_changes import changes_between
from s2train.config import PretrainConfig, settings_by_name
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.needles.config import NeedleConfig
from s2train.planning import check, compose_run, resolve
from s2train.settings_page import register_all
from s2train.study.files import Folders
from s2train.study.settings import Recipe, train_settings
from s2train.study.variants import Run
from s2train.validation.division import smallest_world
from s2train.validation.token_budgets import step_tokens

CONF = Path(__file__).parents[1] / "conf"
H100 = Hardware("NVIDIA H100 80GB HBM3", "cuda", 85_017_624_576)


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*overrides: str, program: str = "pretrain") -> DictConfig:
    register_all()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(program, overrides=list(overrides))


def pretrain(*overrides: str) -> PretrainConfig:
    return copy.deepcopy(resolved(*overrides))


@cache
def resolved(*overrides: str) -> PretrainConfig:
    return resolve(composed(*overrides), names("model"))


def test_the_tree_has_every_size_dense_and_hybrid() -> None:
    sizes = ("tiny", "demo", "needle", "30m", "125m", "350m", "1b", "7b")
    twins = [f"{size}_{kind}" for size in sizes for kind in ("dense", "hybrid")]
    ablations = ["needle_hybrid_homogeneous", "needle_sparse_homogeneous", "needle_sparse_shifted"]
    selected = [f"{size}_{scorer}" for size in ("tiny", "needle", "125m") for scorer in ("moba", "index", "sea")]
    hyper = ["tiny_hyper", "needle_hyper", "125m_hyper"]
    assert names("model") == sorted(twins + ablations + selected + hyper)


def test_the_lowest_learning_rate_is_a_tenth_of_the_highest_unless_it_is_set() -> None:
    assert pretrain("+model=tiny_hybrid").optim.min_lr == 3e-4  # to the last bit, as runs had it set before
    swept = pretrain("+model=tiny_hybrid", "optim.lr=1e-4")
    assert swept.optim.min_lr == 1e-5
    assert check(swept, 1, H100)
    assert pretrain("+model=tiny_hybrid", "optim.lr=1e-4", "optim.min_lr_ratio=0.5").optim.min_lr == 5e-5
    assert pretrain("+model=tiny_hybrid", "optim.lr=1e-2", "optim.min_lr=2e-5").optim.min_lr == 2e-5


def test_the_needle_models_differ_in_layout_and_schedule_alone() -> None:
    dense, *others = (pretrain(f"+model={name}") for name in names("model") if name.startswith("needle_"))
    for other in others:
        other.layout, other.schedule = dense.layout, dense.schedule
        other.model.name, other.run_dir = dense.model.name, dense.run_dir
        assert other == dense


@pytest.mark.parametrize("model", names("model"))
def test_a_model_composes_and_runs_on_the_hardware_it_is_meant_for(model: str) -> None:
    cfg = pretrain(f"+model={model}")
    assert cfg.model.name == model
    assert cfg.run_dir == f"runs/{model}"
    assert (cfg.layout.layers == "D") == model.endswith("_dense")
    assert check(cfg, smallest_world(cfg), H100).fits


@pytest.mark.parametrize("size", ["tiny", "needle", "30m", "125m", "350m", "1b", "7b"])
def test_dense_and_hybrid_of_a_size_differ_in_layout_alone(size: str) -> None:
    dense, hybrid = pretrain(f"+model={size}_dense"), pretrain(f"+model={size}_hybrid")
    hybrid.layout, hybrid.model.name, hybrid.run_dir = dense.layout, dense.model.name, dense.run_dir
    assert dense == hybrid


@pytest.mark.parametrize("scorer", ["moba", "index", "sea"])
@pytest.mark.parametrize("size", ["tiny", "125m"])
def test_selected_and_dense_of_a_size_differ_in_layout_alone(size: str, scorer: str) -> None:
    dense, selected = pretrain(f"+model={size}_dense"), pretrain(f"+model={size}_{scorer}")
    assert selected.layout.kinds["E"]["scorer"] == scorer
    selected.layout, selected.model.name, selected.run_dir = dense.layout, dense.model.name, dense.run_dir
    assert dense == selected


@pytest.mark.parametrize("layout", names("layout"))
def test_a_layout_composes_and_overrides_the_model_s(layout: str) -> None:
    # whose layers the string stands for
    model = {"s2_b64_l4_v6": "30m_hybrid", "hyper_b256": "125m_hybrid"}.get(layout, "350m_hybrid")
    cfg = pretrain(f"+model={model}", f"layout={layout}")
    assert cfg.layout == OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(type(cfg.layout)), OmegaConf.load(CONF / f"layout/{layout}.yaml"))
    )
    assert check(cfg, 1, H100).fits


@pytest.mark.parametrize("schedule", names("schedule"))
def test_a_schedule_composes(schedule: str) -> None:
    cfg = pretrain("+model=7b_hybrid", f"schedule={schedule}", "layout.pattern.stride=8")
    assert cfg.schedule.kind == ("shifted" if schedule == "two_dense_heads" else schedule)
    assert cfg.schedule.dense_heads == (2 if schedule == "two_dense_heads" else 0)
    cfg.layout.allow_partial_coverage = schedule == "homogeneous"
    assert check(cfg, 8, H100).fits


@pytest.mark.parametrize("group", ["data", "optim"])
def test_other_groups_compose(group: str) -> None:
    for name in names(group):
        assert pretrain("+model=1b_dense", f"{group}={name}")


@pytest.mark.parametrize("experiment", names("experiment"))
def test_an_experiment_composes_with_its_model_and_fits_one_gpu(experiment: str) -> None:
    more = ["checkpoint.resume=runs/layout_study"] if experiment == "long_context" else []
    cfg = pretrain(f"+experiment={experiment}", *more)
    assert (cfg.model.name, cfg.run_dir) == (experiment, f"runs/{experiment}")
    assert cfg.train.steps == math.ceil(cfg.train.tokens / (cfg.train.seq_length * cfg.train.global_batch_size))
    assert check(cfg, 1, H100).fits


def test_the_experiment_layout_study_is_the_quality_study_s_hybrid() -> None:
    experiment = compose_run(["+experiment=layout_study"])
    study = compose_run(train_settings(Folders(Path("runs/study"), Path()), Run("hybrid"), Recipe(3e-4, 1 << 17)))
    own = {"data", "run_dir", "seed", "tracking", "evaluation.seed"}
    found, expected = (
        {name: value for name, value in settings_by_name(asdict(cfg)) if not {name, name.partition(".")[0]} & own}
        for cfg in (experiment, study)
    )
    in_tokens = {"model.name": "layout_study", "train.tokens": 300_000_000, "optim.warmup_tokens": 14_942_208}
    assert found == expected | in_tokens


def test_the_long_context_experiment_continues_the_layout_study_s_at_four_times_its_length() -> None:
    before, after = (compose_run([f"+experiment={name}", *more]) for name, more in (
        ("layout_study", []), ("long_context", ["checkpoint.resume=runs/layout_study"])
    ))  # fmt: skip
    assert after.train.seq_length == 4 * before.train.seq_length
    assert step_tokens(after) == step_tokens(before)
    changed = {str(change).partition(" ")[0] for change in changes_between(before, after)}
    assert {name for name in changed if name.startswith(("model.", "layout."))} == {"model.name", "model.rotary_base"}


def test_steps_on_the_command_line_contradict_an_experiment_s_tokens() -> None:
    with pytest.raises(ConfigError, match=r"^train.steps=5: train.tokens=300000000 is 2289 steps"):
        compose_run(["+experiment=layout_study", "train.steps=5"])
    assert compose_run(["+experiment=layout_study", "train.tokens=null", "train.steps=5"]).train.steps == 5


@pytest.mark.parametrize("override", ["layout=dense", "model=125m_dense"])
def test_an_experiment_s_dense_twin_is_made_by_one_override(override: str) -> None:
    assert compose_run(["+experiment=layout_study"]).layout.layers == "DSSS"
    assert compose_run(["+experiment=layout_study", override]).layout.layers == "D"


def test_a_model_replaces_the_experiment_s_without_a_plus() -> None:
    assert compose_run(["+experiment=layout_study", "model=tiny_hybrid"]).model.hidden_size == 128


def test_every_group_is_covered_here() -> None:
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert groups == {"model", "layout", "schedule", "data", "optim", "experiment"}


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("layout.pattern.stride=8", lambda cfg: cfg.layout.pattern.stride == 8),
        ("layout.pattern.sinks=1", lambda cfg: cfg.layout.pattern.sinks == 1),
        ("schedule.dense_heads=4", lambda cfg: cfg.schedule.dense_heads == 4),
        ("layout.layers=DDS30", lambda cfg: cfg.layout.layers == "DDS30"),
        ("schedule.kind=rotating", lambda cfg: cfg.schedule.kind == "rotating"),
        ("parallel.tp=4", lambda cfg: cfg.parallel.tp == 4),
        ("train.seq_length=65536", lambda cfg: cfg.train.seq_length == 65536),
        ("optim.lr=1e-4", lambda cfg: cfg.optim.lr == 1e-4),
        ("data.path=[0.3,a,0.7,b]", lambda cfg: cfg.data.path == [0.3, "a", 0.7, "b"]),
    ],
)
def test_the_command_line_wins(override: str, value: Callable[[PretrainConfig], bool]) -> None:
    assert value(pretrain("+model=7b_hybrid", override))
    assert not value(pretrain("+model=7b_hybrid"))


@pytest.mark.parametrize(
    "override",
    [
        "layout.patern.stride=8",
        "train.sequence_length=128",
        "modle=tiny_hybrid",
        "train.steps=many",
        "train.seq_length=1.5",
        "optim.lr=fast",
        "parallel.sequence_parallel=maybe",
        "model.rotary_base=1e4",
        "layout=no_such_layout",
        "schedule=no_such_schedule",
    ],
)
def test_a_typo_or_a_wrong_type_is_rejected_when_composed(override: str) -> None:
    with pytest.raises(HydraException):
        composed("+model=tiny_hybrid", override)


def test_an_unknown_model_is_rejected_with_the_known_ones() -> None:
    with pytest.raises(HydraException, match="7b_hybrid"):
        composed("+model=8b_hybrid")


def test_no_model_is_rejected_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="7b_hybrid") as rejection:
        pretrain()
    assert rejection.value.setting == "+model"


def test_a_setting_without_a_value_is_named() -> None:
    with pytest.raises(ConfigError) as rejection:
        pretrain("+model=tiny_hybrid", "train.steps=???")
    assert rejection.value.setting == "train.steps"


def test_hydra_writes_nothing() -> None:
    register_all()
    for program in ("pretrain", "needle"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            hydra = compose(program, return_hydra_config=True).hydra
        assert hydra.output_subdir is None
        assert hydra.run.dir == "."
        for logging in (hydra.job_logging, hydra.hydra_logging):
            assert "handlers" not in logging


def test_the_needle_program_composes() -> None:
    cfg = resolve(composed("checkpoint=runs/tiny_hybrid", "lengths=[128,256]", program="needle"), [])
    assert isinstance(cfg, NeedleConfig)
    assert cfg.lengths == [128, 256]
    with pytest.raises(HydraException):
        composed("chekpoint=runs/tiny_hybrid", program="needle")
    with pytest.raises(ConfigError) as rejection:
        resolve(composed(program="needle"), [])
    assert rejection.value.setting == "checkpoint"
