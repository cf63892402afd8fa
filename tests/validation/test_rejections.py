"""A run that can't work is rejected with the setting to change, before anything is allocated."""

import math
from dataclasses import replace
from typing import Any

import pytest

from s2train.config import (
    LayoutConfig,
    ModelConfig,
    ParallelConfig,
    PretrainConfig,
    ScheduleConfig,
    TrainConfig,
)
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.planning import check, preview

GIB = 1024**3
GPU = Hardware("GPU", "cuda", 80 * GIB)
CPU = Hardware("CPU", "cpu", 8 * GIB)


def config(**changes: Any) -> PretrainConfig:
    """A hybrid of 8 layers; keywords are settings with `__` for the dot."""
    cfg = PretrainConfig(
        model=ModelConfig(
            name="small",
            num_layers=8,
            hidden_size=256,
            ffn_hidden_size=768,
            num_attention_heads=8,
            num_query_groups=4,
            vocab_size=1024,
        ),
        layout=LayoutConfig(layers="DSSS", block_size=64),
        schedule=ScheduleConfig(kind="shifted"),
        train=TrainConfig(steps=1000, seq_length=4096, global_batch_size=16, micro_batch_size=2),
    )
    cfg.layout.pattern.stride = 8
    for name, value in changes.items():
        *sections, setting = name.split("__")
        owner: Any = cfg
        for section in sections:
            owner = getattr(owner, section)
        assert hasattr(owner, setting)
        setattr(owner, setting, value)
    return cfg


def rejection(hardware: Hardware, processes: int = 1, **changes: Any) -> ConfigError:
    """The error of a run that is rejected."""
    with pytest.raises(ConfigError) as rejected:
        check(config(**changes), processes, hardware)
    return rejected.value


TWELVE_HEADS = {"model__num_attention_heads": 12, "model__hidden_size": 384, "model__vocab_size": 1032}
# What is wrong: changes, processes, the setting that the error names, and what its remedy says.
DIVISION: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "one process, tp 2": ({"parallel__tp": 2}, 1, "parallel.tp", "--nproc-per-node 2"),
    "six processes, pp 4": ({"parallel__pp": 4}, 6, "parallel.pp", "--nproc-per-node 4"),
    "heads by tp": ({"parallel__tp": 3}, 3, "parallel.tp", "model.num_attention_heads"),
    "KV heads by tp": ({"parallel__tp": 4, "model__num_query_groups": 6} | TWELVE_HEADS, 4, "parallel.tp", "2, 3, 6"),
    "rows of shared KV heads by tp": (
        {"parallel__tp": 12, "model__head_dim": 16} | TWELVE_HEADS,
        12,
        "parallel.tp",
        "1, 2, 4, or change model.num_query_groups",
    ),
    "vocabulary by tp": ({"parallel__tp": 4, "model__vocab_size": 1022}, 4, "parallel.tp", "vocab_size"),
    "ffn by tp": ({"parallel__tp": 4, "model__ffn_hidden_size": 770}, 4, "parallel.tp", "ffn_hidden_size"),
    "hidden by heads": ({"model__hidden_size": 260}, 1, "model.num_attention_heads", "model.head_dim"),
    "heads by KV heads": ({"model__num_query_groups": 3}, 1, "model.num_query_groups", "2, 4"),
    "KV heads of one head": (
        {"model__num_attention_heads": 1},
        1,
        "model.num_query_groups",
        "num_query_groups to 1, or",
    ),
    "odd head": ({"model__head_dim": 33}, 1, "model.head_dim", "even"),
    "an odd number of dimensions that turn": ({"model__rotary_percent": 0.3}, 1, "model.rotary_percent", "0.25"),
    "more dimensions than there are turn": (
        {"model__rotary_percent": 1.5},
        1,
        "model.rotary_percent",
        "rotary_percent=1.",
    ),
    "layers by pp": ({"parallel__pp": 3}, 3, "parallel.pp", "2, 4"),
    "fewer layers than stages": (
        {"parallel__pp": 16, "parallel__pipeline_split": "cost"},
        16,
        "parallel.pp",
        "8 or less",
    ),
    "fewer layers than virtual stages of two ranks": (
        {"parallel__pp": 2, "parallel__vpp": 5, "parallel__pipeline_split": "cost"},
        2,
        "parallel.pp",
        "Set parallel.vpp=null, and parallel.pp to 8 or less.",
    ),
    "recomputed groups of stages split by cost": (
        {
            "parallel__pp": 3,
            "parallel__pipeline_split": "cost",
            "train__recompute": "full",
            "train__recompute_num_layers": 2,
            "train__global_batch_size": 12,
        },
        3,
        "train.recompute_num_layers",
        "pipeline_split=even",
    ),
    "layers by recomputed groups": (
        {"parallel__pp": 2, "train__recompute": "full", "train__recompute_num_layers": 3},
        2,
        "train.recompute_num_layers",
        "1, 2, 4",
    ),
    "layers of a virtual stage by recomputed groups": (
        {
            "parallel__pp": 2,
            "parallel__vpp": 2,
            "train__recompute": "full",
            "train__recompute_num_layers": 4,
        },
        2,
        "train.recompute_num_layers",
        "1, 2",
    ),
    "layers by pp and vpp": ({"parallel__pp": 2, "parallel__vpp": 3}, 2, "parallel.vpp", "null, 2, 4"),
    "one virtual stage": ({"parallel__pp": 2, "parallel__vpp": 1}, 2, "parallel.vpp", "null, or 2"),
    "vpp without pp": ({"parallel__vpp": 2}, 1, "parallel.vpp", "parallel.pp=2"),
    "micro batches by pp under vpp": (
        {"parallel__pp": 4, "parallel__vpp": 2, "train__global_batch_size": 12},
        4,
        "train.global_batch_size",
        "multiple of 8, such as 16",
    ),
    "sequence parallel alone": (
        {"parallel__sequence_parallel": True},
        1,
        "parallel.sequence_parallel",
        "false",
    ),
    "sequence by tp": (
        {"parallel__tp": 4, "parallel__sequence_parallel": True, "train__seq_length": 4098},
        4,
        "train.seq_length",
        "4100",
    ),
    "sequence by cp and block": (
        {"parallel__cp": 2, "train__seq_length": 4096 + 64},
        2,
        "train.seq_length",
        "4352",
    ),
    "sequence by cp": ({"parallel__cp": 2, "train__seq_length": 4098}, 2, "train.seq_length", "4100"),
    "batch by dp and micro batch": ({"train__global_batch_size": 18}, 2, "train.global_batch_size", "20"),
    "batch below dp": ({"train__global_batch_size": 2}, 2, "train.global_batch_size", "such as 4"),
}


@pytest.mark.parametrize("case", DIVISION)
def test_what_does_not_divide_is_rejected(case: str) -> None:
    changes, world_size, setting, remedy = DIVISION[case]
    error = rejection(GPU, world_size, **changes)
    assert error.setting == setting
    assert remedy in error.remedy


def test_deterministic_training_takes_no_kernel_that_is_not() -> None:
    cfg = config(train__deterministic=True, dense_attention="cudnn")
    with pytest.raises(ConfigError, match="Set dense_attention=auto"):
        check(cfg, 1, GPU)


VALUES: dict[str, tuple[Any, str]] = {
    "train__max_skipped_steps": (-1, "train.max_skipped_steps to 0 or more"),
    "train__spike_factor": (0.0, "train.spike_factor to a positive"),
    "train__timeout_minutes": (0.0, "train.timeout_minutes to a positive"),
    "data__num_workers": (1_000_000, "1,024 or less"),
    "checkpoint__keep_every": (1000, "checkpoint.keep too"),
    "train__precision": ("fp61", "train.precision=fp"),
    "train__recompute": ("selectiv", "train.recompute=selective"),
    "optim__decay_style": ("cosin", "optim.decay_style=cosine"),
    "tracking__wandb": ("on", "tracking.wandb=online"),
    "tracking__x_axis": ("steps", "tracking.x_axis=step"),
    "tracking__timing": (3, "0, 1, 2"),
    "parallel__pipeline_split": ("costs", "parallel.pipeline_split=cost"),
    "layer_backend": ("lokal", "layer_backend=local"),
    "attention_backend": ("tritom", "attention_backend=triton"),
    "dense_attention": ("cuddn", "dense_attention=cudnn"),
    "profile__steps": ([10, 2], "profile.steps=[998,1000]"),
    "profile__ranks": ([-1], "profile.ranks=[0]"),
    "schedule__kind": ("shifty", "shifted"),
    "train__micro_batch_size": (0, "positive"),
    "train__steps": (-1, "positive"),
    "parallel__tp": (0, "positive"),
    "parallel__vpp": (0, "positive"),
    "model__num_layers": (0, "positive"),
    "train__exit_step": (0, "positive"),
    "checkpoint__allow_changes": (["optim.lr", "optim.clip"], "optim.clip_grad"),
    "checkpoint__keep": (0, "positive"),
    "checkpoint__interval": (0, "positive"),
    "evaluation__batches": (0, "positive"),
    "tracking__log_interval": (0, "positive"),
    "optim__lr": (float("inf"), "optim.lr"),
    "optim__weight_decay": (-0.1, "0 or more"),
    "run_dir": ("", "runs/mine"),
    "layout__pattern__stride": (0, "1 or more"),
    "layout__pattern__sinks": (-1, "0 or more"),
    "layout__block_size": (48, "16, 32, 64, 128, 256"),
    "layout__layers": ("DSXS", "D (dense), S (s2)"),
    "optim__min_lr": (1.0, "or less, or optim.min_lr=null"),
    "optim__min_lr_ratio": (1.5, "1 or less"),
    "tracking__tags": (["a" * 65], "tracking.notes"),
    "tracking__entity": ("", "tracking.entity=NAME"),
    "optim__beta2": (1.0, "such as"),
    "optim__warmup_steps": (1000, "less than 1000"),
    "data__num_samples": (0, "positive"),
    "train__seq_length": (32, "layout.block_size"),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_out_of_its_range_is_rejected(name: str) -> None:
    value, remedy = VALUES[name]
    error = rejection(GPU, **{name: value})
    assert error.setting == name.replace("__", ".")
    assert error.value == value
    assert remedy in error.remedy


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("train__seq_length", "Set 8388608 or less, or a larger layout.block_size"),
        ("model__num_layers", "Set 4,096 or less"),
        ("model__num_attention_heads", "Set 4,096 or less"),
    ],
)
def test_a_size_for_which_a_layout_would_take_hours_is_rejected(name: str, remedy: str) -> None:
    error = rejection(GPU, **{name: 1234567890})
    assert error.setting == name.replace("__", ".")
    assert remedy in error.remedy


def test_a_timeout_that_clocks_overflow_by_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"train\.timeout_minutes=1e\+30: is more than a year\. Set 525,600 or less"):
        check(config(train__timeout_minutes=1e30), 1, GPU)


def test_a_stop_after_the_end_of_the_run_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"train\.exit_step=1001: .*train\.steps=1000"):
        check(config(train__exit_step=1001), 1, GPU)
    assert check(config(train__exit_step=1000), 1, GPU)


def test_keeping_checkpoints_where_none_are_saved_is_rejected() -> None:
    kept = {"checkpoint__keep": 2, "checkpoint__interval": 300}
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_every=1000: .*checkpoint\.interval.* such as 900"):
        check(config(checkpoint__keep_every=1000, **kept), 1, GPU)
    assert check(config(checkpoint__keep_every=900, **kept), 1, GPU)


@pytest.mark.parametrize(
    "name",
    [
        *("optim__lr", "optim__min_lr", "optim__min_lr_ratio", "optim__weight_decay", "optim__clip_grad"),
        *("optim__beta1", "model__init_std"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_rejected(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match="finite") as rejection:
        check(config(**{name: value}), 1, GPU)
    assert rejection.value.setting == name.replace("__", ".")


def test_the_lowest_learning_rate_is_set_in_one_way() -> None:
    both = config(optim__lr=1e-3, optim__min_lr=2e-4, optim__min_lr_ratio=0.1)
    with pytest.raises(ConfigError, match=r"optim\.min_lr_ratio=0\.1: .*0\.0001, .*0\.0002.*optim\.min_lr=null"):
        check(both, 1, GPU)
    both.optim.min_lr_ratio = 0.2  # the same
    assert check(both, 1, GPU)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_a_generator_would_not_take_is_rejected(seed: int) -> None:
    with pytest.raises(ConfigError, match=f"seed={seed}"):
        check(config(seed=seed), 1, GPU)
    assert check(config(seed=2**32 - 1), 1, GPU)


def test_groups_of_recomputed_layers_matter_to_full_recomputation_only() -> None:
    assert check(config(train__recompute="selective", train__recompute_num_layers=3), 1, GPU)


def test_wsd_needs_the_length_of_its_decay() -> None:
    error = rejection(GPU, optim__decay_style="WSD")
    assert error.setting == "optim.wsd_decay_steps"
    assert check(config(optim__decay_style="WSD", optim__wsd_decay_steps=100), 1, GPU).fits


@pytest.mark.parametrize("setting", ["wsd_decay_steps", "wsd_decay_tokens"])
def test_a_final_decay_is_rejected_where_the_style_has_none(setting: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^optim.{setting}=100: .*decay_style=cosine. Set optim.decay_style=WSD, or"
    ):
        check(config(**{f"optim__{setting}": 100}), 1, GPU)


@pytest.mark.parametrize("backend", ["triton", "portable"])
def test_triton_is_rejected_where_there_is_no_gpu(backend: str) -> None:
    assert check(config(attention_backend=backend), 1, GPU)
    with pytest.raises(ConfigError, match="attention_backend=auto"):
        check(config(attention_backend=backend), 1, CPU)


def test_far_blocks_that_no_head_sees_are_rejected() -> None:
    error = rejection(GPU, layout__pattern__stride=16)
    assert error.setting == "schedule.kind"
    assert check(config(layout__pattern__stride=16, layout__allow_partial_coverage=True), 1, GPU)


def test_blocks_do_not_matter_to_a_dense_model() -> None:
    assert check(config(layout__layers="D", train__seq_length=48), 1, GPU)
    assert check(config(layout__layers="D", train__seq_length=4100, parallel__cp=2), 2, GPU)


def test_a_sequence_that_is_no_multiple_of_the_block_is_accepted_without_context_parallel() -> None:
    assert check(config(train__seq_length=1000), 1, GPU)


def test_one_line_names_setting_value_and_remedy() -> None:
    error = rejection(GPU, parallel__tp=2)
    line = str(error)
    assert line.startswith("parallel.tp=2: ")
    assert "\n" not in line
    assert line.endswith(error.remedy)


def settings_of(remedy: str) -> dict[str, str]:
    """`a.b=c` pairs of a remedy's sentence."""
    return dict(word.rstrip(".").split("=") for word in remedy.split() if "=" in word)


def applied(cfg: PretrainConfig, settings: dict[str, str]) -> PretrainConfig:
    changes: dict[str, dict[str, Any]] = {"train": {}, "parallel": {}}
    for name, text in settings.items():
        section, setting = name.split(".")
        changes[section][setting] = {"true": True, "false": False}.get(text, int(text) if text.isdigit() else text)
    return replace(
        cfg,
        train=replace(cfg.train, **changes["train"]),
        parallel=replace(cfg.parallel, **changes["parallel"]),
    )


@pytest.mark.parametrize("memory", [13, 9, 6.5, 5.5, 4.5])
def test_a_run_that_does_not_fit_is_rejected_with_settings_that_do(memory: float) -> None:
    cfg = config(train__seq_length=65536, parallel=ParallelConfig(distributed_optimizer=False))
    small = replace(GPU, memory=int(memory * GIB))
    with pytest.raises(ConfigError) as rejection:
        check(cfg, 4, small)
    assert "GiB" in rejection.value.problem
    settings = settings_of(rejection.value.remedy)
    assert settings
    found = preview(applied(cfg, settings), 4, small)
    assert found.fits


def test_recomputing_the_mlp_is_suggested_before_whole_layers() -> None:
    cfg = config(train__seq_length=65536, train__micro_batch_size=1)
    needed = check(replace(cfg, train=replace(cfg.train, recompute="mlp")), 4, GPU).memory.total
    with pytest.raises(ConfigError) as rejection:
        check(cfg, 4, replace(GPU, memory=needed))
    assert settings_of(rejection.value.remedy) == {"train.recompute": "mlp"}


def test_a_model_too_large_for_one_process_is_sent_to_more() -> None:
    cfg = config(model__hidden_size=8192, model__ffn_hidden_size=32768, train__micro_batch_size=1)
    with pytest.raises(ConfigError) as rejection:
        check(cfg, 1, GPU)
    assert rejection.value.setting == "+model"
    words = rejection.value.remedy.rstrip(".").split()
    assert words[-1] == "processes"
    assert check(applied(cfg, settings_of(rejection.value.remedy)), int(words[-2]), GPU).fits


def test_more_processes_do_not_help_a_cpu() -> None:
    cfg = config(model__hidden_size=8192, model__ffn_hidden_size=32768)
    with pytest.raises(ConfigError, match="smaller model"):
        check(cfg, 1, CPU)


def test_a_rank_to_profile_that_is_not_there_is_rejected() -> None:
    traced = {"profile__steps": [3, 4], "profile__ranks": [0, 7]}
    with pytest.raises(ConfigError, match=r"profile.ranks=\[0,7\]: there are 2 ranks, but no rank 7. .*ranks=\[0\]"):
        check(config(**traced), 2, GPU)
    check(config(**traced), 8, GPU)
    check(config(profile__ranks=[9]), 1, GPU)  # nothing is traced


@pytest.mark.parametrize("valid_path", ["bundled", 3, "runs/data/mine"])
def test_held_out_data_that_can_not_be_are_rejected_in_a_plan_too(valid_path: object) -> None:
    cfg = config(data__path="runs/data/mine", data__valid_path=valid_path)
    for planned in (check, preview):
        with pytest.raises(ConfigError, match=r"^data.valid_path="):
            planned(cfg, 1, CPU)
