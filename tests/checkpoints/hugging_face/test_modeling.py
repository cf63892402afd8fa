"""The modelling file's forward: caches by either name of transformers, and nothing that it would have to overlook."""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from s2train.checkpoints.hugging_face.folder import write_weights
from s2train.checkpoints.hugging_face.modeling_s2 import Cache, S2Config, S2ForCausalLM

VOCABULARY, PROMPT = 60, 21
CONFIG: dict[str, Any] = {
    "architectures": ["S2ForCausalLM"],
    "model_type": "s2_llama",
    "auto_map": {"AutoConfig": "modeling_s2.S2Config", "AutoModelForCausalLM": "modeling_s2.S2ForCausalLM"},
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layout": {
        "block_size": 4,
        "patterns": [{"kind": "local_vertical", "local": 1, "stride": 2, "offset": h, "sinks": 0} for h in range(2)],
        "layers": [[0, 1, 0, 1]] * 3,
    },
}


@pytest.fixture
def model() -> S2ForCausalLM:
    """Random, in float64, so that no choice of a token is a matter of rounding."""
    made = S2ForCausalLM(S2Config(**CONFIG)).double().eval()
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return made


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, PROMPT))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_a_cache_is_taken_by_either_name(model: S2ForCausalLM, tokens: Tensor, name: str) -> None:
    cache = Cache()
    parts = [model(part, **{name: cache}).logits for part in tokens.split([15, 5, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens).logits)


@torch.no_grad()
def test_use_cache_makes_one_where_none_is_given(model: S2ForCausalLM, tokens: Tensor) -> None:
    first = model(tokens[:, :-1], use_cache=True)
    cache = getattr(first, "past_key_values", None) or first.cache
    assert cache.get_seq_length() == PROMPT - 1
    last = model(tokens[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(last, model(tokens).logits[:, -1:])


@pytest.mark.parametrize("name", ["kv_cache", "past_states", "cache_params"])
def test_a_cache_by_a_name_that_it_does_not_know_is_an_error(model: S2ForCausalLM, tokens: Tensor, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        model(tokens, **{name: Cache()})
    kinds = {parameter.kind for parameter in inspect.signature(S2ForCausalLM.forward).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds


class FixedCache(Cache):
    """As transformers' StaticCache: as many keys as there will be, at once."""

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return tuple(torch.nn.functional.pad(part, (0, 0, 0, 9)) for part in super().update(key, value, layer))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"cache": Cache(), "past_key_values": Cache()}, "two caches"),
        ({"cache": FixedCache()}, "FixedCache gives 30 keys back where 21 are known: use a cache that grows"),
        ({"attention_mask": torch.ones(2, 1, PROMPT, PROMPT)}, "the layout makes the mask"),
        ({"attention_mask": (torch.arange(PROMPT) > 0).expand(2, -1)}, "padded before a token"),
        ({"attention_mask": (torch.arange(PROMPT) != 7).expand(2, -1)}, "padded before a token"),
        ({"position_ids": torch.arange(1, PROMPT + 1)[None]}, "position_ids other than 0, 1"),
        ({"cache_position": torch.arange(5, PROMPT + 5)}, "position_ids other than 0, 1"),
        ({"inputs_embeds": torch.ones(2, PROMPT, 32)}, "takes input_ids alone"),
        ({"output_attentions": True}, "nothing else"),
        ({"return_dict": False}, "nothing else"),
        ({"labels": torch.ones(2, PROMPT, dtype=torch.int64), "logits_to_keep": 1}, "leave logits_to_keep out"),
    ],
)
def test_what_it_would_have_to_overlook_is_refused(
    model: S2ForCausalLM, tokens: Tensor, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        model(tokens, **arguments)


@torch.no_grad()
def test_what_says_what_holds_anyway_changes_nothing(model: S2ForCausalLM, tokens: Tensor) -> None:
    mask = (torch.arange(PROMPT) < 18).long().expand(2, -1)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)  # as transformers counts them
    output = model(
        tokens, attention_mask=mask, position_ids=positions, output_attentions=False, return_dict=True, use_cache=False
    )
    torch.testing.assert_close(output.logits, model(tokens).logits)
    torch.testing.assert_close(model(tokens, logits_to_keep=4).logits, output.logits[:, -4:])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers isn't installed")
def test_transformers_generates_with_and_without_a_cache_what_the_model_does(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    made = S2ForCausalLM(S2Config(**CONFIG))
    write_weights(folder, {name: torch.randn_like(weight) * 0.5 for name, weight in made.state_dict().items()})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    source = inspect.getsourcefile(S2ForCausalLM)
    assert source is not None
    (folder / "modeling_s2.py").write_text(Path(source).read_text())
    # Not here: in the repository's root transformers takes kernels/ for Hugging Face's package.
    program = Path(__file__).with_name("transformers_program.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", str(program), str(folder)],
        env=environment | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("static cache") in ("equal", "refused")
    assert found == dict.fromkeys(["with a cache", "without", "a cache by hand", "saved again"], "equal")
