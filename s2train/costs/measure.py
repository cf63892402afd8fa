"""Measure a model's speed without attention: forward and backward on this GPU.

    python -m s2train.costs.measure OUTPUT.json

Runs, in plain torch, one layer's norms, projections and SwiGLU, and the LM head with its cross-entropy, at the shapes
of our models. `s2train.costs.prediction` holds the results. They don't include the optimizer, communication and
Megatron's work between the layers.
"""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS = 8192
VOCABULARY = 32768
# name -> hidden, feed-forward, key and value widths, as in conf/model/size
SHAPES = {"125m": (768, 2048, 256), "350m": (1024, 2816, 256), "1b": (2048, 8192, 512), "7b": (4096, 14336, 1024)}


class _Layer(nn.Module):
    """A decoder layer whose attention returns its queries."""

    def __init__(self, hidden: int, ffn: int, kv: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.norms = nn.ModuleList([nn.RMSNorm(hidden), nn.RMSNorm(hidden)])
        self.qkv = nn.Linear(hidden, hidden + 2 * kv, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.up = nn.Linear(hidden, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.qkv(self.norms[0](x))[..., : self.hidden])
        gate, up = self.up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class _Head(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.out = nn.Linear(hidden, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self.out(x).float(), torch.arange(len(x), device=x.device))


def rate(module: nn.Module, hidden: int) -> float:
    """Measure FLOP/s of forward and backward over TOKENS tokens.

    Counts 6 FLOPs per matrix weight and token.
    """
    x = torch.randn(TOKENS, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)
    times = []
    for _ in range(30):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        module(x).sum().backward()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 6 * weights * TOKENS / median(times[5:])


def ceiling() -> float:
    """Measure FLOP/s of an 8192³ product in bf16."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    times = []
    for _ in range(30):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ a
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * 8192**3 / median(times[5:])


def measure() -> dict[str, object]:
    """Measure TFLOP/s of every shape's layer and head."""
    shapes = {}
    for name, (hidden, ffn, kv) in SHAPES.items():
        modules = {"layer": _Layer(hidden, ffn, kv), "head": _Head(hidden)}
        shapes[name] = {
            part: rate(module.to("cuda", torch.bfloat16), hidden) / 1e12 for part, module in modules.items()
        }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tokens": TOKENS,
        "ceiling_tflops": ceiling() / 1e12,
        "tflops": shapes,
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
