"""launch/show_layout.py as a user runs it."""

import json
from pathlib import Path
from typing import Any

import pytest

from s2train.config import LayoutConfig, ModelConfig, PatternConfig, ScheduleConfig, TrainConfig
from s2train.costs.attention import attention_flops
from s2train.errors import ConfigError
from s2train.planning.config import ShowLayoutConfig
from s2train.planning.run_layout import hybrid_layout
from s2train.planning.show import show
from tests.program import Outcome, error_line, run

MODEL = ModelConfig(
    name="small", num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2,
    vocab_size=320,
)  # fmt: skip


def settings(folder: Path, layers: str = "DSSS", kind: str = "shifted", **changes: Any) -> ShowLayoutConfig:
    return ShowLayoutConfig(
        model=MODEL,
        layout=LayoutConfig(layers, 16, PatternConfig(local=4, stride=4)),
        schedule=ScheduleConfig(kind),
        train=TrainConfig(steps=1000, seq_length=256, global_batch_size=1),
        output=str(folder),
        **changes,
    )


def contents(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "layout.json").read_text())


def test_the_file_has_every_sort_of_layer_and_every_length(tmp_path: Path) -> None:
    cfg = settings(tmp_path)
    show(cfg)
    content = contents(tmp_path)
    dense, sparse = content["layers"]
    assert (dense["layers"], sparse["layers"]) == ([0], [1, 2, 3])
    assert (dense["density"], dense["coverage"], sparse["coverage"]) == (1, 1, 1)
    assert sparse["attention_flops"]["forward"] == attention_flops(hybrid_layout(cfg).layers[1], 256, 16)
    lengths = [costs["seq_length"] for costs in content["costs"]]
    assert lengths == sorted(lengths)
    assert {256, 8192, 1_048_576} <= set(lengths)
    assert (tmp_path / "layout.png").is_file()


def test_seq_length_overrides_the_run_s(tmp_path: Path) -> None:
    show(settings(tmp_path, seq_length=2048))
    assert contents(tmp_path)["seq_length"] == 2048


def test_blocks_that_no_head_sees_are_shown_and_not_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show(settings(tmp_path, "S", "homogeneous", seq_length=1024))
    out = capsys.readouterr().out
    assert "of the causal blocks seen in each layer" in out
    within = contents(tmp_path)["reach_within_last_layers"][-1]["within"]
    assert within[0] < within[1] <= within[-1]


def test_the_program_takes_the_overrides_of_a_run(tmp_path: Path) -> None:
    arguments = ["+model=125m_hybrid", "layout=s2_b64_l16_v8", "layout.layers=D4S8", "schedule=strided"]
    done = run("show_layout.py", *arguments, f"output={tmp_path}", processes=0)
    assert done.status == 0, done.err
    content = contents(tmp_path)
    assert (content["layout"]["block_size"], content["schedule"]["kind"]) == (64, "strided")
    assert content["layers"][0]["layers"] == [0, 1, 2, 3]
    assert "125m_hybrid at 8,192 tokens, blocks of 64" in done.out
    table = done.out.split("predicted speed-ups")[1]
    assert all(name in table for name in ("tokens", "streamed", "attention", "step"))


def test_figures_are_whole_in_a_table_of_many_lengths(tmp_path: Path) -> None:
    done = run("show_layout.py", "+model=tiny_hybrid", f"output={tmp_path}", processes=0)
    table = done.out.split("predicted speed-ups")[1]
    assert "streamed" in table
    assert "0.000244" in table


def test_blocks_without_tokens_are_rejected_by_their_setting(tmp_path: Path) -> None:
    cfg = settings(tmp_path, seq_length=100)
    cfg.layout.block_size = 0
    with pytest.raises(ConfigError, match=r"^layout\.block_size=0: "):
        show(cfg)


@pytest.mark.parametrize("argument", ["layers=[4]", "seq_length=0", "schedule=shfted", "seq_lengthh=3"])
def test_invalid_settings_are_rejected_in_one_line(tmp_path: Path, argument: str) -> None:
    done: Outcome = run("show_layout.py", "+model=tiny_hybrid", argument, f"output={tmp_path / 'out'}", processes=0)
    assert done.status == 2
    assert error_line(done).startswith(f"error: {argument.split('=')[0]}=")
    assert not (tmp_path / "out").exists()
