import json
import random
from pathlib import Path

import pytest
import torch

from s2train.checkpoints.hugging_face.folder import WeightsFolder, write_weights
from s2train.checkpoints.hugging_face.weights import from_llama, llama_shapes, to_llama, with_rows
from s2train.config import ModelConfig
from s2train.errors import ConfigError


def random_llama(tie: bool = False) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Or Qwen3, if tied."""
    model = ModelConfig("x", 2, 24, 40, 6, random.choice([1, 2, 3, 6]), 8, 30, tie_embeddings=tie, qk_norm=tie)
    return model, {name: torch.randn(shape) for name, shape in llama_shapes(model).items()}


@pytest.mark.parametrize("tie", [False, True])
def test_weights_go_to_megatron_and_back_unchanged(tie: bool) -> None:
    model, weights = random_llama(tie)
    back = to_llama(from_llama(weights, model), model)
    assert list(back) == list(weights)
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_rows_that_are_added_are_zeros_and_come_off_again() -> None:
    weight = torch.randn(5, 3)
    padded = with_rows(weight, 8)
    assert padded.shape == (8, 3)
    assert not padded[5:].any()
    assert torch.equal(with_rows(padded, 5), weight)


@pytest.mark.parametrize("shard_bytes", [10**9, 5000])
def test_what_is_written_is_read_from_one_file_or_several(tmp_path: Path, shard_bytes: int) -> None:
    _, weights = random_llama()
    weights = {name: weight.bfloat16() for name, weight in weights.items()}
    write_weights(tmp_path, weights, shard_bytes)
    (tmp_path / "config.json").write_text("{}")
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == 1 if shard_bytes == 10**9 else len(files) > 2
    folder = WeightsFolder(tmp_path, "weights")
    assert folder.shapes == {name: tuple(weight.shape) for name, weight in weights.items()}
    assert all(torch.equal(folder.read(name), weight) for name, weight in weights.items())


def test_a_damaged_folder_is_rejected(tmp_path: Path) -> None:
    _, weights = random_llama()
    with pytest.raises(ConfigError, match=r"weights=.*config\.json can't be read"):
        WeightsFolder(tmp_path, "weights")
    (tmp_path / "config.json").write_text(json.dumps([]))
    with pytest.raises(ConfigError, match=r"weights=.*config\.json is no JSON object"):
        WeightsFolder(tmp_path, "weights")
    (tmp_path / "config.json").write_text(json.dumps({}))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match=r"but pytorch_model\.bin.*safe_serialization=True"):
        WeightsFolder(tmp_path, "weights")
    write_weights(tmp_path, weights)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"model\.safetensors can't be read.*Download it again"):
        WeightsFolder(tmp_path, "weights")
