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


LAYOUT = CONFIG["layout"]
MASK = {"kind": "mask", "num_blocks": 2, "bits": "AQM="}


def patterns(*first: Any) -> dict[str, Any]:
    return {"layout": LAYOUT | {"patterns": [*first, *LAYOUT["patterns"]]}}


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"layout": None}, "layout is null or missing, not settings by name"),
        ({"layout": []}, "layout is [], not settings by name"),
        ({"layout": LAYOUT | {"format": 2}}, "layout.format is 2, not 1"),
        ({"layout": LAYOUT | {"block_size": "4"}}, 'layout.block_size is "4", not a number of tokens'),
        ({"layout": LAYOUT | {"layers": [[0] * 4] * 2}}, "layout.layers is [[0, 0, 0, 0], [0, 0, 0, 0]], not a list"),
        ({"layout": LAYOUT | {"layers": [[0] * 4, [0, 1, 2, 0], [0] * 4]}}, "layout.layers[1] is [0, 1, 2, 0], not"),
        ({"layout": LAYOUT | {"layers": [[0] * 3] * 3}}, "layout.layers[0] is [0, 0, 0], not the numbers of 4 heads'"),
        (patterns(None), "layout.patterns[0].kind is null or missing, not one of dense"),
        (patterns({"kind": "moba"}), 'layout.patterns[0].kind is "moba", not one of dense'),
        (patterns({"kind": ["dense"]}), 'layout.patterns[0].kind is ["dense"], not one of'),
        (patterns({"kind": "dense", "sinks": 1}), "layout.patterns[0] has sinks, as no dense pattern"),
        (patterns({"kind": "sliding_window", "window": 2}), "layout.patterns[0] lacks sinks, as no sliding_window"),
        (patterns({"kind": "sliding_window", "window": True, "sinks": 0}), "layout.patterns[0].window is true, not"),
        (patterns({"kind": "span", "base": 1, "slope": 1.0, "sinks": 0}), "layout.patterns[0].slope is 1.0, not"),
        (
            patterns({"kind": "ranges", "ranges": [[3, 1], [2, 1]], "offset": 0, "sinks": 0}),
            "layout.patterns[0].ranges",
        ),
        (patterns({"kind": "global_blocks", "local": 1, "blocks": [0, "1"]}), "layout.patterns[0].blocks is [0,"),
        (patterns(MASK | {"bits": "AQMB"}), 'layout.patterns[0].bits is "AQMB", not'),
        (patterns(MASK | {"bits": "?"}), 'layout.patterns[0].bits is "?", not'),
    ],
)
def test_a_damaged_layout_is_one_error_with_the_file_the_entry_and_the_remedy(
    tmp_path: Path, changed: dict[str, Any], problem: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changed))
    with pytest.raises(ValueError, match="config") as damaged:
        S2ForCausalLM.from_folder(str(tmp_path))
    text = str(damaged.value)
    assert text.startswith(f"{tmp_path / 'config.json'}: {problem}"), text
    assert text.endswith("Export the checkpoint again (launch/export.py)")


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_config_that_is_no_json_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json can't be read \(.*\)\. Export the checkpoint again"):
        S2ForCausalLM.from_folder(str(tmp_path))


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
        ({"attention_mask": (torch.arange(PROMPT) != 7).expand(2, -1)}, "padded between tokens"),
        ({"attention_mask": torch.zeros(2, PROMPT)}, "nothing but padding"),
        ({"attention_mask": torch.ones(2, PROMPT + 1)}, "22 columns for 0 cached and 21 new tokens"),
        ({"position_ids": torch.arange(1, PROMPT + 1)[None]}, "position_ids other than 0, 1"),
        ({"cache_position": torch.arange(5, PROMPT + 5)}, "position_ids other than 0, 1"),
        ({"inputs_embeds": torch.ones(2, PROMPT, 32)}, "takes input_ids alone"),
        ({"output_attentions": True}, "nothing else"),
        ({"return_dict": False}, "nothing else"),
        ({"labels": torch.ones(2, PROMPT, dtype=torch.int64), "logits_to_keep": 1}, "leave logits_to_keep out"),
    ],
)
def test_what_it_would_have_to_overlook_is_rejected(
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


def padded(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens [b, s] padded on the left, and their mask."""
    size = max(len(part) for part in parts)
    pads = [size - len(part) for part in parts]
    tokens = torch.stack([torch.nn.functional.pad(p, (n, 0)) for p, n in zip(parts, pads, strict=True)])
    return tokens, (torch.arange(size) >= torch.tensor(pads)[:, None]).long()


@torch.no_grad()
def test_a_sequence_after_padding_on_the_left_is_as_alone(model: S2ForCausalLM) -> None:
    lengths = [PROMPT, *torch.randint(1, PROMPT, (3,)).tolist()]
    parts = [torch.randint(0, VOCABULARY, (length,)) for length in lengths]
    tokens, mask = padded(parts)
    first = PROMPT - 4  # a shorter part is all padding so far
    cache = Cache()
    if all(length > 4 for length in lengths):
        found = torch.cat(
            [
                model(tokens[:, :first], attention_mask=mask[:, :first], cache=cache).logits,
                model(tokens[:, first:-1], attention_mask=mask[:, :-1], cache=cache).logits,
                model(tokens[:, -1:], attention_mask=mask, cache=cache).logits,
            ],
            dim=1,
        )
    else:
        found = model(tokens, attention_mask=mask).logits
    for logits, part in zip(found, parts, strict=True):
        torch.testing.assert_close(logits[-len(part) :], model(part[None]).logits[0])


@pytest.mark.parametrize("choice", ["masks", "kernels"])
@torch.no_grad()
def test_autocast_computes_padded_sequences_in_its_dtype(choice: str) -> None:
    made = S2ForCausalLM(S2Config(**CONFIG | {"layout": CONFIG["layout"] | {"block_size": 16}})).eval()
    made.set_attention(choice)
    tokens, mask = padded([torch.arange(PROMPT), torch.arange(13)])
    with torch.autocast("cpu", torch.bfloat16):
        found = made(tokens, attention_mask=mask).logits
    assert found.dtype == torch.bfloat16
    expected = made(tokens, attention_mask=mask).logits[mask == 1]
    assert (found[mask == 1] - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
def test_a_cache_of_padded_sequences_needs_the_mask(model: S2ForCausalLM) -> None:
    tokens, mask = padded([torch.arange(9), torch.arange(5)])
    cache = Cache()
    model(tokens, attention_mask=mask, cache=cache)
    with pytest.raises(ValueError, match="pass the attention_mask of all tokens"):
        model(tokens[:, -1:], cache=cache)


@pytest.mark.parametrize("tie", [False, True])
@torch.no_grad()
def test_a_modules_weights_may_be_there_only_while_it_runs(tokens: Tensor, tie: bool) -> None:
    """As accelerate has them for a device_map that offloads."""
    made = S2ForCausalLM(S2Config(**CONFIG, tie_word_embeddings=tie)).double().eval()
    expected = made(tokens).logits
    for module in made.modules():
        if own := dict(module.named_parameters(recurse=False)):
            kept = {name: weight.clone() for name, weight in own.items()}
            module.register_forward_pre_hook(
                lambda _, __, own=own, kept=kept: [own[name].copy_(weight) for name, weight in kept.items()] and None
            )
            module.register_forward_hook(lambda *_, own=own: [w.fill_(torch.nan) for w in own.values()] and None)
            for weight in own.values():
                weight.fill_(torch.nan)
    assert torch.equal(made(tokens).logits, expected)


def test_a_device_map_divides_no_layer(model: S2ForCausalLM) -> None:
    assert S2ForCausalLM._no_split_modules == [type(model.model.layers[0]).__name__]


PATTERNS: list[dict[str, Any]] = [
    {"kind": "dense"},
    {"kind": "local_vertical", "local": 2, "stride": 3, "offset": 1, "sinks": 1},
    {"kind": "sliding_window", "window": 2, "sinks": 1},
    {"kind": "global_blocks", "local": 1, "blocks": [0, 3]},
    {"kind": "dilated", "local": 1, "dilation": 2, "offset": 1, "window": 5},
    {"kind": "span", "base": 1, "slope": 0.4, "sinks": 0},
    {"kind": "ranges", "ranges": [[1, 1], [4, 2], [None, 3]], "offset": 0, "sinks": 0},
    {"kind": "mask", "num_blocks": 8, "bits": "AQMHCREhQYE="},
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern["kind"])
@torch.no_grad()
def test_kernels_give_the_logits_of_masks(pattern: dict[str, Any]) -> None:
    layout = {
        "block_size": 16,
        "patterns": [pattern, PATTERNS[1]],
        "layers": [[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0]],
    }
    made = S2ForCausalLM(S2Config(**CONFIG | {"layout": layout})).double().eval()
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    tokens, mask = padded([torch.randint(0, VOCABULARY, (length,)) for length in (113, 66)])
    results = []
    for choice in ("masks", "kernels"):
        made.set_attention(choice)
        cache, parts = Cache(), []
        for start, stop in ((0, 79), (79, 112), (112, 113)):
            output = made(tokens[:, start:stop], attention_mask=mask[:, :stop], cache=cache)
            parts.append(output.logits)
        results.append(torch.cat(parts, dim=1) * mask[..., None])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("choice", ["auto", "masks"])
def test_kernels_are_not_run_on_a_cpu_unless_chosen(
    model: S2ForCausalLM, tokens: Tensor, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s2train.checkpoints.hugging_face import modeling_s2

    monkeypatch.setattr(modeling_s2, "block_sparse_attention", None)
    model.set_attention(choice)
    model(tokens)
    model.set_attention("kernels")
    with pytest.raises(ValueError, match="block_size must be one of"):  # the kernels' own
        model(tokens)


def test_kernels_that_are_not_installed_cannot_be_chosen(model: S2ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from s2train.checkpoints.hugging_face import modeling_s2

    monkeypatch.setattr(modeling_s2, "BlockLayout", None)
    with pytest.raises(ValueError, match="s2train is not installed"):
        model.set_attention("kernels")
    with pytest.raises(ValueError, match="auto, kernels or masks"):
        model.set_attention("triton")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers isn't installed")
def test_transformers_generates_with_and_without_a_cache_what_the_model_does(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    config = CONFIG | {"qk_norm": True}
    made = S2ForCausalLM(S2Config(**config))
    write_weights(folder, {name: torch.randn_like(weight) * 0.5 for name, weight in made.state_dict().items()})
    (folder / "config.json").write_text(json.dumps(config))
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
    assert found.pop("static cache") in ("equal", "rejected")
    cases = ["with a cache", "without", "a cache by hand", "saved again", "padded", "sampled", "beams"]
    assert found == dict.fromkeys(cases, "equal")
