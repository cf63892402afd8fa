"""Checkpoints exported, weights imported: the same logits everywhere."""

import importlib.util
import json
import random
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from s2train.kernels.relative_error import relative_error

from s2train.checkpoints.folders import read_config
from s2train.checkpoints.hugging_face.folder import WeightsFolder, write_weights
from s2train.checkpoints.hugging_face.llama_config import llama_model
from s2train.checkpoints.hugging_face.modeling_s2 import S2Config, S2ForCausalLM
from s2train.checkpoints.hugging_face.weights import llama_shapes
from s2train.config import ModelConfig
from s2train.errors import ConfigError
from s2train.layouts.patterns.file import write_masks
from tests.program import SMALL, Outcome, error_line, metrics, pretrain, run

pytestmark = [pytest.mark.slow]

VOCABULARY, LENGTH = 272, 203
OWN: dict[str, Any] = {"layout": {"layers": "D"}, "schedule": {}, "tokenizer": "bytes"}  # of an export's config.json
# fp32: a few roundings of sums over some hundred terms, in another order
TOLERANCE = 2e-5


def tokens_of(vocabulary: int = 257) -> np.ndarray:
    return np.random.default_rng().integers(0, vocabulary, (2, LENGTH))


def megatron_logits(checkpoint: Path, tokens: np.ndarray, folder: Path) -> torch.Tensor:
    np.save(folder / "tokens.npy", tokens)
    files = [str(path) for path in (checkpoint, folder / "tokens.npy", folder / "logits.npy")]
    run("tests.checkpoints.hugging_face.logits_program", *files, processes=0).succeeded()
    return torch.from_numpy(np.load(folder / "logits.npy"))


def import_weights(weights: Path, output: Path, *settings: str) -> Outcome:
    """By launch/import.py, with the run's settings in a `conf` beside the output, not in the repository's."""
    arguments = [f"weights={weights}", f"output={output}", f"conf={output.parent / 'conf'}", *settings]
    return run("import.py", *arguments, processes=0)


def load_file(path: Path) -> ModuleType:
    """The exported modelling file as a separate module, where s2train is not installed."""
    spec = importlib.util.spec_from_file_location("exported_modeling", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("s2train", "s2train.kernels"):
            patch.setitem(sys.modules, name, None)  # its import fails
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "settings",
    [
        ["train.precision=fp32", "model.tie_embeddings=false", "model.num_query_groups=1", "model.rotary_percent=0.5"],
        [
            "train.precision=bf16",
            "model.qk_norm=true",
            "layout.pattern.sinks=1",
            "model.rope_scaling={kind:yarn,factor:4,original_length:128}",
        ],
    ],
)
def test_the_modelling_file_gives_the_logits_of_the_checkpoint(tmp_path: Path, settings: list[str]) -> None:
    own = [*settings, "model.init_std=0.2", "train.steps=2", "optim.warmup_steps=1"]
    pretrain(tmp_path / "run", *own).succeeded()
    run("export.py", f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'out'}", processes=0).succeeded()
    load = load_file(tmp_path / "out" / "modeling_s2.py").S2ForCausalLM.from_folder
    tokens = tokens_of()

    def logits() -> tuple[torch.Tensor, torch.Tensor]:
        """In the model's precision, and in float64."""
        with torch.no_grad():
            return tuple(model(torch.from_numpy(tokens)).logits for model in (load(out), load(out).double()))

    out = str(tmp_path / "out")
    found, exact = logits()
    assert relative_error(megatron_logits(tmp_path / "run", tokens, tmp_path), exact) < 2 * relative_error(found, exact)

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(
        json.dumps({**config, "layout": None, "architectures": ["LlamaForCausalLM"]})
    )
    dense, _ = logits()
    assert relative_error(dense, exact) > 5 * relative_error(found, exact)


def test_a_dense_model_whose_heads_turn_in_part_is_no_plain_llama(tmp_path: Path) -> None:
    pretrain(
        tmp_path / "run",
        "layout=dense",
        "model.rotary_percent=0.5",
        "train.precision=fp32",
        "train.steps=2",
        "optim.warmup_steps=1",
    ).succeeded()
    run("export.py", f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'out'}", processes=0).succeeded()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["partial_rotary_factor"]) == (["S2ForCausalLM"], 0.5)
    model = S2ForCausalLM.from_folder(str(tmp_path / "out"))
    tokens = tokens_of()
    with torch.no_grad():
        found = model(torch.from_numpy(tokens)).logits
    assert relative_error(found, megatron_logits(tmp_path / "run", tokens, tmp_path)) < TOLERANCE


def test_decoding_over_its_cache_is_decoding_without(tmp_path: Path) -> None:
    # In float64, so that no choice is a matter of rounding.
    model = S2ForCausalLM.from_folder(str(write_llama(tmp_path / "llama", hybrid=True))).double()
    prompt = torch.randint(0, VOCABULARY, (2, 37))
    tokens = model.greedy(prompt, 20)
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits[:, 36:]
    assert torch.equal(tokens[:, 37:], logits.argmax(-1))


def write_llama(
    folder: Path, *, hybrid: bool = False, tie: bool = False, groups: int = 2, qk_norm: bool = False, **changed: Any
) -> Path:
    """A random Llama, or with `qk_norm` Qwen3, in Hugging Face's form, of SMALL's shape."""
    model = ModelConfig("x", 4, 64, 96, 4, groups, 16, VOCABULARY, tie_embeddings=tie, qk_norm=qk_norm)
    folder.mkdir()
    weights = {
        name: torch.randn(shape) * 0.2 if len(shape) > 1 else torch.rand(shape) + 0.5
        for name, shape in llama_shapes(model).items()
    }
    write_weights(folder, weights, shard_bytes=100_000)
    patterns = [{"kind": "local_vertical", "local": 1, "stride": 2, "offset": h, "sinks": 0} for h in range(2)]
    layout = {"block_size": 8, "patterns": patterns, "layers": [[0, 1, 0, 1]] * 4}
    config = {
        "architectures": ["Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if qk_norm else "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": groups,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000.0,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tie,
        **({"layout": layout} if hybrid else {}),
        **changed,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load_llama(folder: Path) -> S2ForCausalLM:
    """A Llama or Qwen3 by our modelling file, which computes what transformers does."""
    weights = WeightsFolder(folder, "weights")
    qk_norm = weights.config["architectures"] == ["Qwen3ForCausalLM"]
    model = S2ForCausalLM(S2Config(**weights.config, qk_norm=qk_norm))
    model.load_state_dict({name: weights.read(name) for name in weights.shapes})
    return model.eval()


@pytest.mark.parametrize(("architecture", "tie"), [("LlamaForCausalLM", False), ("Qwen3ForCausalLM", True)])
def test_imported_weights_give_their_logits_and_come_back_as_they_were(
    tmp_path: Path, architecture: str, tie: bool
) -> None:
    scaling = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 128}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled = {} if tie else {"rope_scaling": scaling}
    qk_norm = architecture == "Qwen3ForCausalLM"
    llama = write_llama(tmp_path / "llama", tie=tie, qk_norm=qk_norm, groups=random.choice([1, 2, 4]), **scaled)
    import_weights(llama, tmp_path / "run", "precision=fp32", "vocab_size=288").succeeded()
    tokens = tokens_of(VOCABULARY)
    with torch.no_grad():
        expected = load_llama(llama)(torch.from_numpy(tokens)).logits
    found = megatron_logits(tmp_path / "run", tokens, tmp_path)
    assert relative_error(found[..., :VOCABULARY], expected) < TOLERANCE
    assert not found[..., VOCABULARY:].any()

    back_as = [f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'back'}", "vocab_size=272"]
    rejected = run("export.py", *back_as, processes=0)  # the Llama came without
    assert error_line(rejected).startswith(f"error: tokenizer={tmp_path / 'run' / 'tokenizer.json'}: no such file. Set")
    run("export.py", *back_as, "tokenizer=bytes", processes=0).succeeded()
    back, there = (load_llama(folder).state_dict() for folder in (tmp_path / "back", llama))
    assert back.keys() == there.keys()
    assert all(torch.equal(back[name], there[name]) for name in there)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["architectures"] == [architecture]
    assert config.get("rope_scaling") == scaled.get("rope_scaling")
    assert not (tmp_path / "back" / "modeling_s2.py").exists()
    assert {name: config[name] for name in ("rope_theta", "rms_norm_eps", "tie_word_embeddings")} == {
        "rope_theta": 5000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": tie
    }  # fmt: skip


@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (0, ["train.precision=bf16", "parallel.distributed_optimizer=false"]),
        pytest.param(2, ["parallel.tp=2", "train.precision=fp32"], marks=pytest.mark.long),
        (2, ["parallel.pp=2", "parallel.vpp=2", "train.precision=bf16"]),
    ],
)
def test_a_hybrid_run_starts_from_an_imported_llama(tmp_path: Path, processes: int, settings: list[str]) -> None:
    llama = write_llama(tmp_path / "llama")
    assert import_weights(llama, tmp_path / "start").status == 0
    shape = ["model.tie_embeddings=false", "model.head_dim=16", "model.rotary_base=5000", "model.norm_epsilon=1e-6"]
    own = [
        *shape,
        *settings,
        f"checkpoint.resume={tmp_path / 'start'}",
        "train.steps=2",
        "optim.lr=1e-9",
        "optim.warmup_steps=1",
    ]
    pretrain(tmp_path / "run", *own, "optim.min_lr=1e-9", processes=processes).succeeded()
    losses = [record["loss"] for record in metrics(tmp_path / "run")]
    assert len(losses) == 2

    # an export of what it trained is the Llama, whose weights such small steps leave
    run("export.py", f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'back'}", processes=0).succeeded()
    back, there = (S2ForCausalLM.from_folder(str(folder)).state_dict() for folder in (tmp_path / "back", llama))
    for name, weight in there.items():
        torch.testing.assert_close(back[name].float(), weight.bfloat16().float(), rtol=0, atol=1e-6)
    assert losses[0] > 5.6  # of an untrained model of this width: far from that of small initial weights, 5.6 = ln 272


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["its architecture is GPT2LMHeadModel", "LlamaForCausalLM"]),
        ({"attention_bias": True}, ["attention_bias=true"]),
        ({"hidden_act": "gelu"}, ["hidden_act=gelu"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, ["rope_scaling", "dynamic"]),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["rope_parameters", "yarn"]),
        ({"sliding_window": 4096}, ["sliding_window=4096"]),
        ({"architectures": ["Qwen3ForCausalLM"]}, ["it lacks model.layers.0.self_attn.q_norm"]),
        ({"num_hidden_layers": "4"}, ["num_hidden_layers=4, not a value of its type", "Fix config.json"]),
        ({"num_hidden_layers": 3}, ["weights that a plain Llama doesn't have", "model.layers.3"]),
        ({"num_hidden_layers": 5}, ["it lacks model.layers.4"]),
        ({"qk_norm": True, "num_hidden_layers": 3}, ["weights that a plain Qwen3 doesn't have", "model.layers.3"]),
        ({"qk_norm": True, "attention_bias": True}, ["attention_bias=true", "Only models without it"]),
        ({"hidden_size": 72}, ["config.json says"]),
        ({"rope_theta": 0.5}, ["rope_theta=0.5"]),
        ({"rope_theta": float("nan")}, ["rope_theta=nan"]),
        ({"rope_parameters": {"rope_theta": 1e6}}, ["rope_theta=5000.0 and rope_parameters.rope_theta=1000000.0"]),
        ({"max_position_embeddings": None}, ["max_position_embeddings=null, not a value of its type"]),
        ({"tie_word_embeddings": "false"}, ["tie_word_embeddings=false, not"]),
        ({"architectures": {"0": "LlamaForCausalLM"}}, ["architectures={0:LlamaForCausalLM}, not a list"]),
        ({"architectures": ["MistralForCausalLM"]}, ["no sliding_window, which transformers takes as 4096"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ({"architectures": ["S2ForCausalLM"]}, ["every head's blocks", "Export the run again"]),
        ({"s2train": OWN | {"layout": {"layer": "D"}}}, ["config.json has s2train.layout.layer=D, ", "Export the run"]),
        (
            {"s2train": OWN | {"layout": {"layers": "Q"}}},
            ["config.json has s2train.layout.layers=Q, ", "Export the run"],
        ),
        ({"s2train": OWN | {"schedule": {"placement": "x"}}}, ["has s2train.schedule.placement=x, ", "Export the run"]),
        ({"s2train": OWN, "layout": ["D"]}, ["give other blocks than its layout lists", "export the run again"]),
    ],
)
def test_what_is_no_plain_llama_is_rejected(tmp_path: Path, changed: dict[str, Any], words: list[str]) -> None:
    from s2train.checkpoints.hugging_face.config import ImportConfig
    from s2train.checkpoints.hugging_face.importing import import_llama

    llama = write_llama(tmp_path / "llama", **changed)
    with pytest.raises(ConfigError) as rejected:
        import_llama(ImportConfig(str(llama), str(tmp_path / "run"), conf=str(tmp_path / "conf")))
    assert str(rejected.value).startswith(f"weights={llama}: ")
    assert all(word in str(rejected.value) for word in words), str(rejected.value)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "conf").exists()


def test_the_window_of_a_qwen3_counts_only_where_it_is_used(tmp_path: Path) -> None:
    def shape(name: str, **changed: Any) -> ModelConfig:
        return llama_model(WeightsFolder(write_llama(tmp_path / name, qk_norm=True, **changed), "weights"))

    own = {"sliding_window": 4096, "max_window_layers": 2}
    for name, used in (("unused", {"use_sliding_window": False}), ("unnamed", {})):
        assert shape(name, **own, **used).qk_norm
    with pytest.raises(ConfigError, match="sliding_window=4096"):
        shape("used", **own, use_sliding_window=True)


def test_a_hybrid_goes_out_and_comes_back_and_trains_on(tmp_path: Path) -> None:
    masks = np.tril(np.random.default_rng().random((4, 8, 8)) < 0.5) | np.eye(8, dtype=bool)
    write_masks(tmp_path / "masks.npz", {1: masks, 2: masks[::-1]}, 16)
    file = f"{{kind:file,file:{tmp_path / 'masks.npz'}}}"
    far = "{kind:ranges,ranges:[[2,1],[null,2]]},{kind:global_blocks,globals:[0,2]}"
    rules = f"{{kind:per_head,rules:[{file},{{kind:dense}},{far}],heads:{[[0, 1, 2, 3]] * 4}}}".replace(" ", "")
    layers = ["layout.layers=DRFS", f"+layout.patterns.R={rules}", f"+layout.patterns.F={file}"]
    own = ["train.precision=fp32", "model.rotary_percent=0.5", "schedule=two_dense_heads", "schedule.dense_heads=1"]
    pretrain(tmp_path / "run", *layers, *own, "train.steps=2", "optim.warmup_steps=1", "model.init_std=0.2").succeeded()
    exported = tmp_path / "out"
    run("export.py", f"checkpoint={tmp_path / 'run'}", f"output={exported}", processes=0).succeeded()
    tokens = np.random.default_rng().integers(0, 257, (2, 128))
    expected = megatron_logits(tmp_path / "run", tokens, tmp_path)
    (tmp_path / "masks.npz").unlink()
    done = import_weights(exported, tmp_path / "start", "precision=fp32").succeeded()
    assert torch.equal(megatron_logits(tmp_path / "start", tokens, tmp_path), expected)

    program, *arguments = shlex.split(done.out.splitlines()[-1])[1:]
    assert len(done.out.splitlines()[-1]) < 120 + 4 * len(str(tmp_path))
    assert program == "launch/pretrain.py"
    few = ["train.exit_step=2", "data.num_workers=0", "tracking.wandb=disabled", "tracking.log_interval=1"]
    further = [argument for argument in arguments if not argument.startswith("run_dir=")]
    run("pretrain.py", *further, f"run_dir={tmp_path / 'further'}", *few, "evaluation.interval=0").succeeded()
    went_on = read_config(tmp_path / "further" / "checkpoints" / "iter_0000002")
    began = read_config(tmp_path / "run" / "checkpoints" / "iter_0000002")
    assert (went_on.schedule, went_on.layout.layers) == (began.schedule, "DRFS")
    assert went_on.model == replace(began.model, name="start", head_dim=16, init_std=went_on.model.init_std)


def test_a_run_of_another_shape_than_the_imported_is_rejected(tmp_path: Path) -> None:
    llama = write_llama(tmp_path / "llama")
    assert import_weights(llama, tmp_path / "start").status == 0
    rejected = run(
        "pretrain.py", *SMALL, f"run_dir={tmp_path / 'run'}", f"checkpoint.resume={tmp_path / 'start'}", processes=0
    )  # fmt: skip
    assert error_line(rejected).startswith("error: model.rotary_base=10000: ")
    assert "was trained with model.rotary_base=5000. Set that value" in error_line(rejected)
    existing = import_weights(llama, tmp_path / "start")
    assert error_line(existing).startswith(f"error: output={tmp_path / 'start'}: it exists")
    missing = run("export.py", "checkpoint=nowhere", f"output={tmp_path / 'out'}", processes=0)
    assert error_line(missing).startswith("error: checkpoint=nowhere: no checkpoint there")
