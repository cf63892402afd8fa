"""A scaling of RoPE that can't work is rejected with the setting to change."""

from typing import Any

import pytest

from s2train.config import ModelConfig
from s2train.errors import ConfigError
from s2train.planning import compose_run
from s2train.rope_scaling import RopeScalingConfig, with_defaults
from s2train.validation.rope_scaling import check_rope_scaling

YARN = {"kind": "yarn", "factor": 4.0, "original_length": 512}


def model_of(base: int = 10_000, **scaling: Any) -> ModelConfig:
    return ModelConfig("x", 4, 64, 96, 4, 2, 16, 272, base, rope_scaling=RopeScalingConfig(**scaling))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "yearn"}, ["model.rope_scaling.kind=yearn", "kind=yarn"]),
        ({"kind": "linear"}, ["model.rope_scaling.factor=null", "Set model.rope_scaling.factor, such as 4"]),
        ({"factor": 4.0}, ["model.rope_scaling.factor=4.0", "kind=none", "factor=null", "linear or yarn or llama3"]),
        ({"kind": "yarn", "factor": 4.0}, ["model.rope_scaling.original_length=null", "such as 8192"]),
        ({"kind": "linear", "factor": 1.0}, ["model.rope_scaling.factor=1.0", "more than 1"]),
        ({"kind": "linear", "factor": -2.0}, ["model.rope_scaling.factor=-2.0", "positive"]),
        ({"kind": "linear", "factor": 2.0, "original_length": 8}, ["original_length=8", "yarn or llama3"]),
        ({**YARN, "beta_fast": 0.5}, ["model.rope_scaling.beta_fast=0.5", "beta_slow=1"]),
        ({**YARN, "kind": "llama3", "low_freq_factor": 4.0}, ["high_freq_factor=4.0", "low_freq_factor=4"]),
        ({**YARN, "kind": "llama3", "truncate": False}, ["model.rope_scaling.truncate=false", "kind=yarn"]),
        ({**YARN, "base": 1}, ["model.rotary_base=1", "more than 1"]),
        ({**YARN, "base": 2, "original_length": 9000}, ["original_length=9000", "kind=none"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else " ".join(value),
)
def test_what_cannot_work_is_rejected(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        check_rope_scaling(model_of(**settings))
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_context_parallelism_divides_yarns_original_length() -> None:
    check_rope_scaling(model_of(**YARN), cp=4)
    with pytest.raises(ConfigError, match=r"original_length=510: .*parallel.cp=2.* multiple of 4"):
        check_rope_scaling(model_of(**YARN | {"original_length": 510}), cp=2)


def test_defaults_are_those_of_the_papers() -> None:
    yarn = with_defaults(RopeScalingConfig("yarn", 8.0, 512))
    assert (yarn.beta_fast, yarn.beta_slow, yarn.truncate) == (32, 1, True)
    assert yarn.temperature == yarn.attention_factor == pytest.approx(1.2079, abs=1e-4)
    llama = with_defaults(RopeScalingConfig("llama3", 8.0, 512))
    assert (llama.low_freq_factor, llama.high_freq_factor, llama.temperature) == (1, 4, 1)


def test_a_command_line_sets_it() -> None:
    cfg = compose_run(["+model=tiny_hybrid", "model.rope_scaling={kind:yarn,factor:4,original_length:512}"])
    assert cfg.model.rope_scaling == RopeScalingConfig("yarn", 4.0, 512)
