"""Greedy tokens of an export and their log-probabilities, by Megatron and our cache; prints JSON.

Arguments: folder, prompts of one length as JSON, number of tokens. In a separate process, since Megatron's groups and
its CPU mode are global.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from s2train.attention.hybrid import HybridLayout
from s2train.checkpoints.hugging_face.weights import from_llama
from s2train.config import ModelConfig, ParallelConfig, PretrainConfig, ScheduleConfig, TrainConfig
from s2train.inference.generation import generate
from s2train.inference.sampling import greedy
from s2train.layouts.schedules import find_schedule
from s2train.megatron.layer_backends import choose_backend
from s2train.megatron.model import build_model, transformer_config, unwrap
from s2train.megatron.setup import initialize, shutdown
from s2train.serving.export_layout import ExportLayout, layer_layout


def run(folder: Path, prompts: list[list[int]], count: int) -> tuple[list[list[int]], torch.Tensor]:
    """Run this program: `count` tokens of each prompt, and their log-probabilities, float64 [prompts, count]."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.our_engine_program", str(folder), json.dumps(prompts), str(count)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tokens, log_probabilities = json.loads(done.stdout.splitlines()[-1])
    return tokens, torch.tensor(log_probabilities, dtype=torch.float64)


def main() -> None:
    folder, prompts, count = Path(sys.argv[1]), torch.tensor(json.loads(sys.argv[2])), int(sys.argv[3])
    device = initialize(ParallelConfig(), 1)
    config = json.loads((folder / "config.json").read_text())
    read = ExportLayout.read(config, str(folder))
    layers = tuple(layer_layout(heads, read.block_size) for heads in read.layers)
    hybrid = HybridLayout(layers, read.block_size, read.num_kv_heads, find_schedule(ScheduleConfig(kind="shifted")))
    model = ModelConfig(
        "test", len(layers), config["hidden_size"], config["intermediate_size"], config["num_attention_heads"],
        read.num_kv_heads, config["head_dim"], config["vocab_size"], tie_embeddings=False,
    )  # fmt: skip
    model.rotary_base, model.norm_epsilon = config["rope_theta"], config["rms_norm_eps"]
    train = TrainConfig(steps=1, seq_length=config["max_position_embeddings"], global_batch_size=1, precision="fp32")
    cfg = PretrainConfig(model=model, train=train)
    (chunk,) = build_model(cfg, transformer_config(cfg), hybrid, choose_backend("local"), device)
    gpt = unwrap(chunk)
    gpt.parallel_output = False
    gpt.output_layer.gather_output = True
    gpt.load_state_dict(from_llama(load_file(folder / "model.safetensors"), model), strict=False)
    found: list[torch.Tensor] = []

    def choose(logits: torch.Tensor) -> torch.Tensor:
        found.append(logits.double().log_softmax(-1).amax(-1))
        return greedy(logits)

    tokens = generate(gpt.eval(), prompts, count, choose=choose)
    print(json.dumps([tokens.tolist(), torch.stack(found, dim=1).tolist()]))
    shutdown()


if __name__ == "__main__":
    main()
