import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from s2train.attention.hybrid import HybridLayout, build_hybrid_layout
from s2train.config import LayoutConfig, ModelConfig, PatternConfig, ScheduleConfig
from s2train.costs.attention_time import AttentionRates, attention_seconds, dense_seconds
from s2train.costs.prediction import LENGTHS, known_lengths, linear_rate, model_costs
from s2train.layouts.patterns import MaskPattern

RESULTS = Path(__file__).parents[2] / "kernels" / "results"
CASES = [
    case
    for name in ("2026-11-29-h200-benchmarks", "2026-11-29-h200-benchmarks-sparse-peers")
    for case in json.loads((RESULTS / f"{name}.json").read_text())["cases"]
]
MODEL = ModelConfig(
    name="m", num_layers=4, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8,
    vocab_size=32768,
)  # fmt: skip


def hybrid_of(layers: str, *, block: int = 128, local: int = 8, stride: int = 16, heads: int = 32, groups: int = 8,
              num_layers: int = 4) -> HybridLayout:  # fmt: skip
    return build_hybrid_layout(
        LayoutConfig(layers, block, PatternConfig(local=local, stride=stride)),
        ScheduleConfig("shifted"),
        num_layers=num_layers,
        num_heads=heads,
        num_query_groups=groups,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_predicted_times_are_near_the_measured_ones(case: dict) -> None:
    hybrid = hybrid_of(
        "S", block=case["block"], local=case["local"], stride=case["stride"], heads=case["heads"],
        groups=case["kv_heads"], num_layers=1,
    )  # fmt: skip
    ours = attention_seconds(hybrid.layers[0], case["length"], case["dim"], AttentionRates())
    measured = case["results"]["ours"]["ms"]
    assert ours.forward * 1e3 == pytest.approx(measured["forward"], rel=0.07)
    assert ours.backward * 1e3 == pytest.approx(measured["backward"], rel=0.09)


@pytest.mark.parametrize("case", [case for case in CASES if "cudnn" in case["results"]], ids=lambda case: case["case"])
@pytest.mark.parametrize("name", ["cudnn", "fa4"])
def test_predicted_dense_times_are_near_the_measured_ones(case: dict, name: str) -> None:
    dense = dense_seconds(case["heads"], case["length"], case["dim"], AttentionRates().dense_by(name))
    assert dense.both * 1e3 == pytest.approx(
        case["results"][name]["ms"]["both"], rel=0.13 if case["dim"] == 64 else 0.07
    )


def test_a_dense_model_gains_nothing() -> None:
    found = model_costs(MODEL, hybrid_of("D"), 8192)
    assert (found.attention_speedup, found.step_speedup) == (1, 1)
    assert found.cache.end == found.cache.dense


def test_the_step_gains_less_than_attention_and_more_at_length() -> None:
    short, long = (model_costs(MODEL, hybrid_of("DSSS"), length) for length in (8192, 131_072))
    assert 1 < short.step_speedup < short.attention_speedup < long.attention_speedup
    assert short.step_speedup < long.step_speedup < long.attention_speedup


def test_the_step_gains_less_the_longer_all_else_takes() -> None:
    found = model_costs(MODEL, hybrid_of("S"), 8192)
    assert replace(found, linear_seconds=0).step_speedup == pytest.approx(found.attention_speedup)
    assert replace(found, linear_seconds=1e3 * found.dense_seconds).step_speedup == pytest.approx(1, abs=1e-3)


def test_the_model_is_the_sum_of_its_layers() -> None:
    found = model_costs(MODEL, hybrid_of("DSSS"), 16_384)
    assert found.density == pytest.approx((1 + 3 * found.layers[1].density) / 4)
    assert found.traffic.forward == found.layers[0].traffic.forward + 3 * found.layers[1].traffic.forward
    assert found.forward_flops == found.layers[0].forward_flops + 3 * found.layers[1].forward_flops


def test_linear_rates_join_the_measured_sizes() -> None:
    assert linear_rate(4096) == linear_rate(8192) == 591e12
    assert linear_rate(512) == linear_rate(768) == 144e12
    assert linear_rate(3072) == pytest.approx((507e12 + 591e12) / 2)


def test_measured_linear_rates_are_those_of_the_file() -> None:
    content = json.loads((RESULTS.parents[1] / "launch" / "results" / "2026-11-22-h100-linear.json").read_text())
    for hidden, name in ((768, "125m"), (1024, "350m"), (2048, "1b"), (4096, "7b")):
        assert linear_rate(hidden) == pytest.approx(content["tflops"][name]["layer"] * 1e12, rel=0.01)


def test_masks_from_a_file_are_counted_as_far_as_they_reach() -> None:
    hybrid = hybrid_of("S")
    assert known_lengths(hybrid) == LENGTHS
    mask = MaskPattern.of(np.tri(256, dtype=bool), "masks.npz", "layout.pattern")
    of_file = replace(hybrid, layers=(replace(hybrid.layers[0], bound=(mask,) * 32),) * 4)
    assert known_lengths(of_file) == (8192, 16_384, 32_768)
    assert model_costs(MODEL, of_file, 32_768).density == 1
