"""Compares linear layers that communicate while they compute with Megatron's; prints errors as JSON.

In separate processes, on CPUs or GPUs.
"""

import json
import math
import sys
import time
import weakref
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, checkpoint
from megatron.core.transformer.transformer_config import TransformerConfig
from s2train.kernels.relative_error import largest
from torch import Tensor, nn

from s2train.config import LayoutConfig, ModelConfig, ParallelConfig, PretrainConfig, TrainConfig
from s2train.megatron.gradient_sums import replace_apex
from s2train.megatron.layer_backends import choose_backend
from s2train.megatron.model import build_model, transformer_config, unwrap
from s2train.megatron.overlapped_linear import overlap_communication
from s2train.megatron.peer_exchange import Exchange, Gathering, Scattering, tensor_parallel_exchange
from s2train.megatron.setup import initialize, shutdown
from s2train.planning import hybrid_layout

HIDDEN, INNER, POSITIONS, BATCH = 24, 40, 32, 3  # of all ranks
HEADS = 8
CASES = [(False, False), (True, False), (True, True)]  # weight gradients summed in buffers, recomputed


class Pair(nn.Module):
    """A column-parallel layer, a function of each element, and a row-parallel layer."""

    def __init__(self, ranks: int, fused: bool) -> None:
        super().__init__()
        config = TransformerConfig(
            num_layers=1, hidden_size=HIDDEN, num_attention_heads=HEADS, tensor_model_parallel_size=ranks,
            sequence_parallel=True, gradient_accumulation_fusion=fused, use_cpu_initialization=True,
        )  # fmt: skip
        common = {"config": config, "init_method": nn.init.normal_, "bias": False, "skip_bias_add": True}
        self.column = ColumnParallelLinear(HIDDEN, INNER, gather_output=False, **common)
        self.row = RowParallelLinear(INNER, HIDDEN, input_is_parallel=True, **common)
        self.cuda()  # on a CPU, too, what Megatron takes for one
        for weight in self.parameters() if fused else ():
            weight.main_grad = torch.ones_like(weight)
            weight.grad_added_to_main_grad = False
            weight.zero_out_wgrad = weight is self.column.weight  # as of embeddings that are the output layer too

    def forward(self, x: Tensor) -> Tensor:
        inner = self.column(x)[0].sin().transpose(0, 1).contiguous().transpose(0, 1)  # no row follows the one before
        out: Tensor
        out, _ = self.row(inner)
        return out


def results(pair: Pair, x: Tensor, dout: Tensor, recompute: bool) -> dict[str, Tensor]:
    """The output, without gradients too, and all gradients."""
    x = x.clone().requires_grad_()
    with torch.no_grad():
        alone = pair(x)
    out = checkpoint(pair, False, x) if recompute else pair(x)
    out.backward(dout)
    found = {"without gradients": alone, "out": out.detach(), "dx": x.grad}
    for name, weight in pair.named_parameters():
        fused = hasattr(weight, "main_grad")
        assert not fused or weight.grad_added_to_main_grad
        assert weight.grad is not None  # Megatron's data parallelism waits for it
        if fused and weight.zero_out_wgrad:  # and adds it
            assert not weight.grad.any()
        found[name] = weight.main_grad if fused else weight.grad
    return {name: value for name, value in found.items() if value is not None}


def errors(ranks: int, exchange: Exchange, fused: bool, recompute: bool, in_vain: bool = False) -> dict[str, float]:
    """Of each result: the largest relative difference of all ranks.

    Args:
        in_vain: before, gather an input ahead that no gradient needs.
    """
    plain, overlapped = Pair(ranks, fused), Pair(ranks, fused)
    overlapped.load_state_dict(plain.state_dict())
    overlap_communication(overlapped, exchange)
    inputs = torch.randn(2, POSITIONS // ranks, BATCH, HIDDEN, device="cuda")
    if in_vain:
        torch.autograd.grad(overlapped(inputs[0].clone().requires_grad_()).sum(), overlapped.row.weight)
    expected, found = (results(pair, *inputs, recompute) for pair in (plain, overlapped))
    assert expected.keys() == found.keys()
    differences = torch.stack([(found[name] - value).norm() / value.norm() for name, value in expected.items()])
    differences.nan_to_num_(nan=math.inf)  # a maximum may drop NaN
    torch.distributed.all_reduce(differences, op=torch.distributed.ReduceOp.MAX)
    return dict(zip(expected, differences.tolist(), strict=True))


class Activation(torch.autograd.Function):
    """An identity whose node keeps an object, as nodes keep activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: list[weakref.ref[nn.Module]]) -> Tensor:
        ctx.activation = nn.Module()
        kept.append(weakref.ref(ctx.activation))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        return dout, None


def kept(ranks: int, exchange: Exchange) -> dict[str, bool]:
    """Whether an activation is alive after a column-parallel layer that no row-parallel one follows."""
    pair = Pair(ranks, fused=False)
    overlap_communication(pair, exchange)
    x = torch.randn(POSITIONS // ranks, BATCH, HIDDEN, device="cuda", requires_grad=True)
    activations: list[weakref.ref[nn.Module]] = []
    pair.column(Activation.apply(x, activations))[0].sum().backward()
    after_backward = stays(activations[0])
    pair.column(Activation.apply(x, activations))
    return {"after its backward": after_backward, "without a backward": stays(activations[1])}


def stays(activation: weakref.ref[nn.Module]) -> bool:
    """Whether it is alive once gloo's threads, which may end later than a collective, hold nothing."""
    deadline = time.monotonic() + 2.0
    while activation() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    return activation() is not None


class Recorded:
    """An exchange that adds names of calls to a list."""

    def __init__(self, exchange: Exchange, calls: list[str]) -> None:
        self._exchange, self._calls = exchange, calls

    def gather(self, rows: Tensor) -> Gathering:
        self._calls.append("gather")
        return self._exchange.gather(rows)

    def scatter(self, rows: Tensor, width: int) -> Scattering:
        self._calls.append("scatter")
        return self._exchange.scatter(rows, width)


def order(ranks: int, exchange: Exchange) -> dict[str, list[str]]:
    """Exchanges of a forward and a backward pass, and where the backward is between the layers."""
    calls: list[str] = []
    pair = Pair(ranks, fused=True)
    overlap_communication(pair, Recorded(exchange, calls))
    inner, _ = pair.column(torch.randn(POSITIONS // ranks, BATCH, HIDDEN, device="cuda"))
    inner.register_hook(lambda _: calls.append("between"))
    out, _ = pair.row(inner.sin())
    forward = list(calls)
    calls.clear()
    out.sum().backward()
    return {"forward": forward, "backward": calls}


def small(ranks: int, overlap: bool, sequence_parallel: bool = True) -> PretrainConfig:
    model = ModelConfig("test", 1, 64, 96, HEADS, 2, 8, vocab_size=96)
    parallel = ParallelConfig(tp=ranks, sequence_parallel=sequence_parallel, tp_comm_overlap=overlap)
    train = TrainConfig(steps=1, seq_length=128, global_batch_size=1, precision="fp32")
    return PretrainConfig(model=model, layout=LayoutConfig(layers="D"), parallel=parallel, train=train)


def overlapping(cfg: PretrainConfig, device: torch.device) -> list[str]:
    """Names of a run's linear layers that do."""
    (chunk,) = build_model(cfg, transformer_config(cfg), hybrid_layout(cfg), choose_backend("local"), device)
    return [name for name, module in unwrap(chunk).named_modules() if hasattr(module, "inputs")]


def main() -> None:
    """Arguments: a seed, and the number of processes: 2, 4 or 8."""
    seed, ranks = map(int, sys.argv[1:])
    device = initialize(ParallelConfig(tp=ranks), seed)
    replace_apex()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills memory that nobody has written with NaN
    torch.manual_seed(seed + torch.distributed.get_rank())  # every rank has other inputs and weights
    exchange = tensor_parallel_exchange(small(ranks, overlap=True), device)
    assert exchange is not None
    found = {
        "errors": {str(case): errors(ranks, exchange, *case) for case in CASES},
        "errors after a part": largest(errors(ranks, exchange, *CASES[0], in_vain=True).values()),
        "exchanges": order(ranks, exchange),
        "kept": kept(ranks, exchange),
        "layers": {
            "of a run": overlapping(small(ranks, overlap=True), device),
            "without overlap": overlapping(small(ranks, overlap=False), device),
            "decoding": overlapping(small(ranks, overlap=True, sequence_parallel=False), device),
        },
    }
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found))
    shutdown()


if __name__ == "__main__":
    main()
