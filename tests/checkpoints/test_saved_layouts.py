"""Saved layout settings are read, also from earlier versions, and compared by meaning."""

from pathlib import Path
from typing import Any

import pytest

from s2train.checkpoints.architecture import check_same_architecture
from s2train.checkpoints.folders import read_config, write_config
from s2train.checkpoints.setting_changes import changes_between, check_allowed
from s2train.config import LayoutConfig, ModelConfig, PatternConfig, PretrainConfig, TrainConfig
from s2train.errors import ConfigError
from s2train.planning import hybrid_layout

# Saved before patterns had kinds, layout schedules had offsets, and plans had settings.
EARLIER = """
model: {name: small, num_layers: 4, hidden_size: 64, ffn_hidden_size: 96, num_attention_heads: 4, num_query_groups: 2,
  head_dim: null, vocab_size: 320, rotary_base: 10000, norm_epsilon: 1.0e-05, init_std: 0.02, tie_embeddings: false}
layout: {layers: DSSS, block_size: 16, pattern: {local: 8, stride: 16, sinks: 0}, allow_partial_coverage: false}
schedule: {kind: rotating}
train: {steps: 10, seq_length: 256, global_batch_size: 8, micro_batch_size: 1}
plan: false
"""
WINDOW = {"kind": "sliding_window", "window": 4}


def config(**layout: Any) -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig("small", 4, 64, 96, 4, 2, vocab_size=320),
        layout=LayoutConfig(**{"layers": "DSSS", "block_size": 16} | layout),
        train=TrainConfig(10, 256, 8),
    )


def resumed(now: PretrainConfig, checkpoint: Path) -> None:
    check_same_architecture(changes_between(read_config(checkpoint), now), checkpoint)


def test_settings_saved_by_an_earlier_version_keep_their_meaning(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(EARLIER)
    saved, now = read_config(tmp_path), config()
    now.schedule.kind = "rotating"
    assert hybrid_layout(saved) == hybrid_layout(now)
    resumed(now, tmp_path)


def test_a_run_of_an_earlier_version_has_no_warm_up_after_its_frozen_trunk(tmp_path: Path) -> None:
    frozen = EARLIER.replace("steps: 10,", "steps: 10, freeze_trunk_steps: 4,") + "optim: {warmup_steps: 3}\n"
    (tmp_path / "config.yaml").write_text(frozen)
    now = config()
    now.run_dir = "runs/small"
    now.train.freeze_trunk_steps, now.optim.warmup_steps, now.schedule.kind = 4, 3, "rotating"
    assert [str(change) for change in changes_between(read_config(tmp_path), now)] == ["optim.trunk_warmup_steps 0 → 3"]
    with pytest.raises(ConfigError, match=r"trunk_warmup_steps=3: .*optim\.trunk_warmup_steps=0 keeps"):
        check_allowed(now, tmp_path, changes_between(read_config(tmp_path), now))
    now.optim.trunk_warmup_steps = 0
    assert changes_between(read_config(tmp_path), now) == []


def test_a_run_of_an_earlier_version_resumes_without_its_chunks_of_communication(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(EARLIER + "parallel: {tp: 2, tp_comm_chunks: 4}\n")
    now = config()
    now.parallel.tp, now.schedule.kind = 2, "rotating"
    resumed(now, tmp_path)
    assert read_config(tmp_path).parallel == now.parallel


def test_a_run_of_an_earlier_version_ordered_held_out_samples_by_its_seed(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(EARLIER + "seed: 7\nevaluation: {interval: 100, batches: 8}\n")
    now = config()
    now.seed, now.schedule.kind, now.run_dir = 7, "rotating", "runs/small"
    before = read_config(tmp_path)
    assert [str(change) for change in changes_between(before, now)] == ["evaluation.seed 7 → 1234"]
    now.evaluation.seed = None
    assert changes_between(before, now) == []


@pytest.mark.parametrize("settings", ["parallel: null\nplan: {}\n", "[plan]\n"])
def test_a_file_without_settings_is_rejected(settings: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(settings)
    with pytest.raises(ConfigError, match=r"config\.yaml can't be read"):
        read_config(tmp_path)


def test_letters_and_ranges_are_read_as_they_were_saved(tmp_path: Path) -> None:
    pattern = PatternConfig("ranges", ranges=[[4, 1], [None, 2]])
    cfg = config(layers="DSSW", pattern=pattern, patterns={"W": WINDOW})
    write_config(cfg, tmp_path / "config.yaml")
    assert read_config(tmp_path).layout == cfg.layout
    resumed(cfg, tmp_path)


def test_an_explicit_default_is_the_same_layout(tmp_path: Path) -> None:
    write_config(config(patterns={"W": WINDOW}), tmp_path / "config.yaml")
    resumed(config(pattern=PatternConfig(local=8, stride=16), patterns={"W": WINDOW | {"sinks": 0}}), tmp_path)


def test_weights_alone_are_rotated_otherwise_only_where_it_is_allowed(tmp_path: Path) -> None:
    now = config()
    write_config(now, tmp_path / "config.yaml")
    now.model.rotary_base = 80_000
    changes = changes_between(read_config(tmp_path), now)
    check_same_architecture(changes, tmp_path, weights_only=True, may_change={"model.rotary_base"})
    with pytest.raises(ConfigError, match=r"^model.rotary_base=80000: .*allow_changes=\[model.rotary_base\]"):
        check_same_architecture(changes, tmp_path, weights_only=True)
    with pytest.raises(ConfigError, match=r"^model.rotary_base=80000: .*checkpoint.weights_only=true"):
        check_same_architecture(changes, tmp_path)


@pytest.mark.parametrize(
    ("kinds", "remedy"),
    [
        ({}, ", or 'checkpoint.allow_changes=[layout.layers,layout.block_size]' for"),
        ({"E": {"kind": "block_selection"}}, ""),
    ],
    ids=["S2 attention", "a kind that may have weights"],
)
def test_a_rejected_new_phase_names_all_changes_to_allow(kinds: dict[str, Any], remedy: str, tmp_path: Path) -> None:
    write_config(config(), tmp_path / "config.yaml")
    now = config(layers="DDDS", block_size=32, kinds=kinds)
    changes = changes_between(read_config(tmp_path), now)
    with pytest.raises(ConfigError, match=r"^layout.layers=DDDS: ") as rejected:
        check_same_architecture(changes, tmp_path, allowed=lambda _: False)
    assert remedy in rejected.value.remedy
    assert ("allow_changes" in rejected.value.remedy) == bool(remedy)


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"pattern": PatternConfig(sinks=1)}, "layout.pattern.sinks"),
        ({"pattern": PatternConfig(kind="dense")}, "layout.pattern.kind"),
        ({"patterns": {"W": WINDOW | {"window": 5}}}, "layout.patterns.W.window"),
        ({"patterns": {}}, "layout.patterns.W.kind"),
        ({"patterns": {"W": WINDOW, "V": {}}}, "layout.patterns.V.kind"),
    ],
)
def test_another_layout_is_rejected_by_its_setting(tmp_path: Path, change: dict[str, Any], setting: str) -> None:
    write_config(config(patterns={"W": WINDOW}), tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=f"^{setting}="):
        resumed(config(**{"patterns": {"W": WINDOW}} | change), tmp_path)
