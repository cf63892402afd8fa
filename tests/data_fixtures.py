import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from s2train.config import DataConfig, EvaluationConfig, LayoutConfig, ModelConfig, PretrainConfig, TrainConfig
from s2train.preparation.config import PrepareConfig
from s2train.preparation.prepare import prepare

MakeConfig = Callable[..., PretrainConfig]


def write_dataset(prefix: Path, text: str | Sequence[str], **settings: Any) -> str:
    """Prepare a text, or documents in JSON lines, from a file beside the dataset; its prefix."""
    if isinstance(text, str):
        source = prefix.with_name(f"{prefix.name}.txt")
        source.write_text(text)
    else:
        source = prefix.with_name(f"{prefix.name}.jsonl")
        source.write_text("\n".join(json.dumps({"text": one}) for one in text))
    prepare(PrepareConfig(input=str(source), output=str(prefix), **settings))
    return str(prefix)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of the bundled corpus as bytes."""
    prefix = str(tmp_path_factory.mktemp("corpus") / "bytes")
    prepare(PrepareConfig(input="bundled", output=prefix))
    return prefix


@pytest.fixture
def config(tmp_path: Path) -> MakeConfig:
    """Makes the settings of a run on `path`; other settings of `data` by keyword."""

    def make(
        path: Any,
        *,
        steps: int = 10,
        seq_length: int = 64,
        vocab_size: int = 257,
        seed: int = 7,
        evaluate: bool = True,
        **data: Any,
    ) -> PretrainConfig:
        return PretrainConfig(
            model=ModelConfig(
                name="tiny",
                num_layers=1,
                hidden_size=8,
                ffn_hidden_size=8,
                num_attention_heads=1,
                num_query_groups=1,
                vocab_size=vocab_size,
            ),
            layout=LayoutConfig(layers="D"),
            data=DataConfig(path=path, cache=str(tmp_path / "cache"), **data),
            train=TrainConfig(steps=steps, seq_length=seq_length, global_batch_size=4),
            evaluation=EvaluationConfig(interval=100 if evaluate else 0),
            seed=seed,
        )

    return make
