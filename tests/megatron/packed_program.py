"""Runs packed documents through small random models, together and one by one; prints the differences as JSON.

In a separate process, since Megatron's groups and its CPU mode are global; under torchrun tensor parallel.
"""

import json
import sys
from typing import Any

import torch

from s2train.config import ParallelConfig
from s2train.megatron.core_attention import packed_documents
from s2train.megatron.setup import initialize, shutdown
from s2train.training.batches import document_bounds
from tests.inference.cached_models import BLOCK, NUM_BLOCKS, VOCABULARY
from tests.inference.cached_program import build, positions_like

LENGTH = BLOCK * NUM_BLOCKS - 3


def random_lengths() -> list[int]:
    """Of documents that fill a sequence: short ones, ones that cross blocks, one of a single token."""
    cuts = torch.randperm(LENGTH - 1)[: int(torch.randint(1, 9, ()))].add(1).sort().values.tolist()
    ends = sorted({1, *cuts, LENGTH})
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def compare(name: str, device: torch.device, tp: int) -> dict[str, float]:
    gpt, _ = build(name, device, tp, backend="torch")  # which takes float64
    gpt.double()
    gpt.rotary_pos_emb.inv_freq = gpt.rotary_pos_emb.inv_freq.double()  # no buffer
    tokens, labels = torch.randint(0, VOCABULARY, (2, 2, LENGTH), device=device)
    documents = [random_lengths(), random_lengths()]
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in documents])
    bounds = document_bounds(positions).to(device)
    weights = torch.rand(2, LENGTH, device=device)

    def losses_of(rows: Any, positions: torch.Tensor, **more: Any) -> torch.Tensor:
        """In float64; Megatron's own are fp32's."""
        logits = gpt(tokens[rows], positions, None, **more)
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[rows], reduction="none")

    whole = losses_of(slice(None), positions)
    losses = losses_of(slice(None), positions, packed_seq_params=packed_documents(bounds, LENGTH))
    (losses * weights).sum().backward()
    gradients = [parameter.grad for parameter in gpt.parameters()]
    for parameter in gpt.parameters():
        parameter.grad = None

    one_by_one = torch.zeros_like(losses)
    for sample, lengths in enumerate(documents):
        start = 0
        for length in lengths:
            rows = (slice(sample, sample + 1), slice(start, start + length))
            alone = losses_of(rows, positions_like(tokens[rows]))
            (alone * weights[rows]).sum().backward()
            one_by_one[rows] = alone.detach()
            start += length
    return {
        "losses": relative(losses.detach(), one_by_one),
        "gradients": max(relative(g, p.grad) for g, p in zip(gradients, gpt.parameters(), strict=True)),
        "uncut": relative(whole.detach(), one_by_one),
    }


def main() -> None:
    """Arguments: seed, tensor parallel size."""
    seed, tp = map(int, sys.argv[1:])
    device = initialize(ParallelConfig(tp=tp), 1)
    torch.manual_seed(seed)  # the same data on every rank
    names = ("dense", "sparse", "hybrid", "a dense head") if tp == 1 else ("hybrid", "a dense head")
    found = {name: compare(name, device, tp) for name in names}
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found))
    shutdown()


if __name__ == "__main__":
    main()
