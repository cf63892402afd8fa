"""What can't be served is rejected in one line, before vLLM starts a worker."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from s2train.checkpoints.hugging_face.layout_json import layout_json
from s2train.errors import ConfigError
from s2train.layouts.patterns import Dense, LocalVertical
from s2train.serving.checks import check
from tests.inference.cached_models import layers_of

LAYOUT = layout_json(
    layers_of([Dense()] * 4, [LocalVertical(1, 3, head) for head in range(4)], block_size=256, num_kv_heads=4)
)
MASK = {"kind": "mask", "num_blocks": 2, "bits": "AQM="}


def config(**changed: Any) -> Any:
    """What the checks read of vLLM's configuration, with settings changed by name."""
    names = ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size")
    parts: dict[str, dict[str, Any]] = {
        "parallel_config": {"tensor_parallel_size": 2, **dict.fromkeys(names, 1)},
        "cache_config": {"cache_dtype": "auto", "kv_offloading_size": None},
        "scheduler_config": {"disable_hybrid_kv_cache_manager": None},
        "hf_config": {"layout": LAYOUT, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2},
        "model_config": {
            "max_model_len": 1024,
            "original_max_model_len": None,
            "model": "runs/export",
            "dtype": torch.bfloat16,
        },
    }
    whole = {"speculative_config": None, "kv_transfer_config": None, "kv_events_config": None}
    for name, value in changed.items():
        owner = next((part for part in parts.values() if name in part), whole)
        owner[name] = value
    made = {name: SimpleNamespace(**part) for name, part in parts.items()}
    made["model_config"].hf_config = made.pop("hf_config")
    return SimpleNamespace(**made, **whole)


def test_what_can_be_served_passes() -> None:
    check(config())
    check(config(tensor_parallel_size=4, cache_dtype="bfloat16", disable_hybrid_kv_cache_manager=False))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tensor_parallel_size": 3}, "tensor_parallel_size=3: doesn't divide the model's 4 KV heads. Set it"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2: sparse layers are divided by tensor parallel only"),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size=2: sparse layers"),
        ({"cache_dtype": "fp8"}, "kv_cache_dtype=fp8: sparse layers keep keys and values in the model's dtype"),
        ({"speculative_config": SimpleNamespace(method="ngram")}, "speculative_config=ngram: sparse layers decode"),
        ({"disable_hybrid_kv_cache_manager": True}, "disable_hybrid_kv_cache_manager=true: without it vLLM"),
        ({"kv_offloading_size": 4.0}, "kv_offloading_size=4.0: pages of sparse layers can't be sent"),
        ({"kv_transfer_config": SimpleNamespace()}, "kv_transfer_config=SimpleNamespace: pages of sparse layers"),
        ({"kv_events_config": SimpleNamespace(enable_kv_cache_events=True)}, "kv_events_config=SimpleNamespace: pages"),
        ({"max_model_len": 1000}, "max_model_len=1000: isn't a multiple of the layout's block of 256"),
        ({"original_max_model_len": -1}, "max_model_len=auto: vLLM may choose a length that isn't a multiple of the"),
        ({"num_hidden_layers": 3}, "hf_overrides.num_hidden_layers=3: the export has the layouts of 2 layers. Leave"),
        ({"layout": None}, "model=runs/export: in its config.json layout is null or missing, not settings by name"),
        ({"layout": LAYOUT | {"format": 7}}, "model=runs/export: in its config.json layout.format is 7, not 1, which"),
        ({"layout": LAYOUT | {"block_size": 8}}, "model=runs/export: its layout has blocks of 8 tokens, and kernels"),
        (
            {"layout": LAYOUT | {"patterns": [{"kind": "moba"}] * 5}},
            'model=runs/export: in its config.json layout.patterns[0].kind is "moba", not one of',
        ),
        (
            {"layout": LAYOUT | {"layers": [[0] * 4, [9] * 4]}},
            "model=runs/export: in its config.json layout.layers[1] is [9, 9, 9, 9], not the numbers of 4 heads'",
        ),
        (
            {"layout": LAYOUT | {"layers": [[0] * 3] * 2}},
            "model=runs/export: in its config.json layout.layers[0] is [0, 0, 0], not the numbers of 4 heads'",
        ),
        (
            {"layout": LAYOUT | {"patterns": [MASK] * 5}},
            "max_model_len=1024: the layout's masks end at 512 tokens. Set --max-model-len 512 or less",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_rejected_in_one_line(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as rejected:
        check(config(**changed))
    assert str(rejected.value).startswith(message)
    assert "\n" not in str(rejected.value)
