"""Scaled rotations in config.json and the modelling file are the papers', and transformers' where it is installed."""

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from s2train.checkpoints.hugging_face.modeling_s2 import S2Config, S2ForCausalLM, scaled_frequencies
from s2train.checkpoints.hugging_face.rope_scaling import from_hugging_face, longest_length, to_hugging_face
from s2train.config import ModelConfig
from s2train.errors import ConfigError
from s2train.rope_scaling import RopeScalingConfig, with_defaults
from tests.megatron.rope_oracle import factor_of_cosines, frequencies

FOLDER = Path("a-llama")
CASES: dict[str, dict[str, Any]] = {
    "linear": {},
    "llama3": {},
    "llama3 of other bounds": {"low_freq_factor": 2.0, "high_freq_factor": 9.0},
    "yarn": {},
    "yarn of other bounds": {"beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
    "yarn with a set temperature": {"attention_factor": 0.75},
}


def model_of(case: str) -> ModelConfig:
    kind = case.split(maxsplit=1)[0]
    scaling = RopeScalingConfig(kind, random.choice([2.5, 4.0, 8.0]), random.randrange(64, 9000, 2), **CASES[case])
    if kind == "linear":
        scaling.original_length = None
    return ModelConfig("x", 4, 64, 96, 4, 2, 64, 272, random.choice([100, 10_000, 500_000]), rope_scaling=scaling)


def config_of(model: ModelConfig) -> dict[str, Any]:
    return {
        "head_dim": model.head_dim,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "rope_theta": float(model.rotary_base),
        "max_position_embeddings": longest_length(model, 2048),
        "rope_scaling": to_hugging_face(model.rope_scaling),
    }


def assert_the_papers(model: ModelConfig, found: torch.Tensor, factor: float, percent: float = 1.0) -> None:
    assert model.head_dim is not None
    expected = frequencies(int(model.head_dim * percent), model.rotary_base, model.rope_scaling)
    # fp32: a power, whose relative error grows with ln(base)
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=5e-6, atol=0)
    assert factor == pytest.approx(factor_of_cosines(model.rope_scaling), rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_modelling_file_turns_by_the_papers_frequencies(case: str) -> None:
    model, percent = model_of(case), random.choice([0.5, 1.0])
    config = S2Config(**config_of(model), partial_rotary_factor=percent)
    assert_the_papers(model, *scaled_frequencies(config, torch.device("cpu")), percent)


def test_the_modelling_file_applies_scaling_and_temperature_to_its_angles() -> None:
    def logits(**scaling: Any) -> torch.Tensor:
        torch.manual_seed(0)
        model = S2ForCausalLM(S2Config(64, 32, 48, 2, 2, **({"rope_scaling": scaling} if scaling else {}))).double()
        found: torch.Tensor = model(torch.arange(40)[None]).logits
        return found

    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    with torch.no_grad():
        plain, scaled, without = logits(), logits(**yarn), logits(**yarn, attention_factor=1.0)
        paper = logits(**yarn, attention_factor=1.1386294361119891)
    torch.testing.assert_close(scaled, paper)
    assert min((a - b).norm() for a, b in ((plain, scaled), (scaled, without), (plain, without))) > 1e-3


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["transformers 4", "transformers 5"])
def test_an_export_comes_back_as_it_was(case: str, form: str) -> None:
    model = model_of(case)
    config = config_of(model)
    if form == "transformers 5":
        config["rope_parameters"] = config.pop("rope_scaling") | {"rope_theta": config.pop("rope_theta")}
    found = from_hugging_face(config, ModelConfig("x", 4, 64, 96, 4, 2, 64, 272, model.rotary_base), FOLDER)
    assert with_defaults(found) == with_defaults(model.rope_scaling)


def test_llama_31_and_deepseeks_forms_are_read() -> None:
    plain = ModelConfig("x", 4, 64, 96, 4, 2, 64, 272)
    llama = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
    llama["original_max_position_embeddings"] = 8192
    read = from_hugging_face({"rope_scaling": llama}, plain, FOLDER)
    assert read == RopeScalingConfig("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    both = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 0.707}
    read = from_hugging_face({"rope_scaling": both, "max_position_embeddings": 4096}, plain, FOLDER)
    assert (read.kind, read.factor, read.original_length) == ("yarn", 40.0, 4096)
    assert read.temperature == pytest.approx((0.1 * 3.688879 + 1) / (0.0707 * 3.688879 + 1), rel=1e-6)
    assert from_hugging_face({"rope_scaling": {"type": "linear", "factor": 1.0}}, plain, FOLDER).kind == "none"


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, ["kind dynamic", "linear, yarn, llama3"]),
        ({"rope_type": "yarn", "factor": 2.0, "short_factor": [1]}, ["short_factor, which is unknown here"]),
        ({"rope_type": "linear"}, ["factor=null", "Fix config.json"]),
        ({"rope_type": "linear", "factor": "much"}, ["could not convert", "Fix config.json"]),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4}, ["original_length=null"]),
        ({"full_attention": {"rope_type": "yarn", "factor": 4.0}}, ["full_attention, which is unknown here"]),
        ("yarn", ["not settings by name", "Fix config.json"]),
    ],
)
def test_a_scaling_that_the_model_cannot_compute_is_rejected(scaling: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        from_hugging_face({"rope_scaling": scaling}, ModelConfig("x", 4, 64, 96, 4, 2, 64, 272), FOLDER)
    assert str(raised.value).startswith("weights=a-llama: config.json has rope_scaling=")
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers isn't installed")
@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_the_export_as_the_same_frequencies(case: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model = model_of(case)
    embedding = LlamaRotaryEmbedding(LlamaConfig(**config_of(model)))
    assert_the_papers(model, embedding.inv_freq, embedding.attention_scaling)
