"""A chosen layout's rules are repeated in a larger model's sizes, as dense at every length."""

from pathlib import Path

import pytest

from s2train.config import LayoutConfig, ModelConfig, PatternConfig
from s2train.costs.attention import density
from s2train.errors import ConfigError
from s2train.layouts.counting import kept_positions
from s2train.layouts.patterns import Dense, Dilated, GlobalBlocks, LocalVertical, Pattern, SlidingWindow, Span
from s2train.planning import compose_run, hybrid_layout
from s2train.semsa.repeat_layout import grown, main, repeat_layout

RULES = [{"kind": "span", "base": 2, "slope": 0.1 * number, "sinks": 1} for number in range(1, 5)] + [{"kind": "dense"}]
CHOSEN = LayoutConfig("S", 64, PatternConfig("per_head", rules=RULES, heads=[[0, 1, 2, 2], [3, 3, 4, 4]]))
LARGER = ModelConfig("larger", 4, 256, 256, 16, 4, vocab_size=64)
LENGTH, LONG = 16384, 131072


def share(pattern: Pattern, length: int, block_size: int = 64) -> float:
    return kept_positions(pattern, block_size, length) / (length * (length + 1) / 2)


def test_layers_groups_and_members_take_the_rules_of_those_they_repeat() -> None:
    pattern = repeat_layout(CHOSEN, 2, LARGER, LENGTH, LONG).pattern
    early, late = [0, 1, 0, 1, 2, 2, 2, 2], [3, 3, 3, 3, 4, 4, 4, 4]
    assert pattern.heads == [early * 2] * 2 + [late * 2] * 2
    assert [rule.get("slope") for rule in pattern.rules] == [
        *(pytest.approx(0.1 * n, abs=0.02) for n in (1, 2, 3, 4)),
        None,
    ]


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize(
    "rule",
    [
        SlidingWindow(40, 1),
        Span(40, 0, 2),
        Span(9, 0.1),
        LocalVertical(9, 16, 3, 1),
        GlobalBlocks(4, (0, 7, 31, 90, 200)),
    ],
    ids=str,
)
def test_a_rule_stays_as_dense_at_any_length(rule: Pattern, block_size: int) -> None:
    own, chosen = grown(rule, 64, LENGTH, block_size, LONG), share(rule, LENGTH)
    assert share(rule, LONG) < 0.8 * chosen
    assert share(own, LONG, block_size) == pytest.approx(chosen, rel=0.07)
    assert share(own, LENGTH, block_size) == pytest.approx(chosen, rel=0.35)


@pytest.mark.parametrize("rule", [SlidingWindow(300), Dense()], ids=str)
def test_a_rule_that_keeps_everything_becomes_dense(rule: Pattern) -> None:
    assert grown(rule, 64, LENGTH, 128, LONG) == Dense()


def test_the_program_writes_a_layout_of_the_larger_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, large = tmp_path / "small.yaml", tmp_path / "large.yaml"
    small.write_text(
        "layers: S\nblock_size: 64\npattern:\n  kind: per_head\n"
        "  rules: [{kind: sliding_window, window: 64, sinks: 1}, {kind: span, base: 1, slope: 0.2}]\n"
        "  heads: [[0, 0, 1, 1], [1, 1, 1, 1]]\n"
    )
    words = ["+model=7b_dense", "--layout", str(small), "--kv-heads", "2", "--length", "16384"]
    assert main([*words, "--block-size", "128", "--output", str(large)]) == 0
    cfg = compose_run(["+model=7b_dense", f"layout=file:{large}"])
    hybrid = hybrid_layout(cfg)
    assert (len(hybrid.layers), len(hybrid.layers[0].heads), hybrid.block_size) == (32, 32, 128)
    said = capsys.readouterr().out
    for length in (8192, 32768, 131072):
        assert f"density {density(hybrid, length):.4f} at {length:,} tokens" in said
        assert density(hybrid, length) == pytest.approx(0.26, abs=0.04)
    with pytest.raises(SystemExit):
        main([*words, "--output", str(large)])
    assert f"output={large}: exists. Name another file" in capsys.readouterr().err  # it has no overwrite=true


def test_what_cannot_be_repeated_is_rejected() -> None:
    with pytest.raises(ConfigError, match="names no rule for each head"):
        repeat_layout(LayoutConfig("S", 64, PatternConfig("dense")), 2, LARGER, LENGTH, LONG)
    with pytest.raises(ConfigError, match="doesn't divide the layout's 4 heads"):
        repeat_layout(CHOSEN, 3, LARGER, LENGTH, LONG)
    with pytest.raises(ConfigError, match="is no multiple of the layout's 64"):
        repeat_layout(CHOSEN, 2, LARGER, LENGTH, LONG, block_size=32)
    with pytest.raises(ConfigError, match="can't be grown"):
        grown(Dilated(1, 4, 0, None), 64, LENGTH, 64, LONG)
