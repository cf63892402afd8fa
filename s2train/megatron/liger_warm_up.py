"""Runs Liger-Kernel's operations once, in the shapes of a run's steps."""

import torch
from torch import Tensor

from s2train.attention.weights import kv_heads_on_rank
from s2train.config import PretrainConfig, head_dim
from s2train.environment.dtypes import DTYPES
from s2train.environment.liger import ROTATION, SWIGLU

_ROWS = 64


def compile_liger(cfg: PretrainConfig, operations: frozenset[str], loss: str, device: torch.device) -> None:
    """Run the operations and the loss of a run, forward and backward.

    Few rows, of zeros: the kernels depend on the number of rows only by its divisibility by 16. The loss `linear`,
    whose pieces depend on it, is left out.

    Args:
        operations: as `s2train.environment.liger.liger_operations` selects them.
        loss: as `s2train.environment.liger.choose_loss` does.
    """
    from s2train.megatron.fused import swiglu, vocab_parallel_loss  # not importable where Liger-Kernel is not installed
    from s2train.megatron.rotation import Rotation

    model, tp = cfg.model, cfg.parallel.tp
    rows = _ROWS + cfg.train.seq_length // cfg.parallel.cp * cfg.train.micro_batch_size % 16

    def zeros(*shape: int) -> Tensor:
        leaf = torch.zeros(shape, dtype=DTYPES[cfg.train.precision], device=device, requires_grad=True)
        return leaf.clone()  # some operations overwrite their inputs

    if SWIGLU in operations:
        swiglu(zeros(rows, 1, 2 * model.ffn_hidden_size // tp)).sum().backward()
    if ROTATION in operations:
        width = head_dim(model)
        query = zeros(rows, 1, model.num_attention_heads // tp, width)
        key = zeros(rows, 1, kv_heads_on_rank(model.num_query_groups, tp), width)
        angles = torch.zeros(rows, 1, 1, int(width * model.rotary_percent), device=device)
        query, key = Rotation()(query, key, angles)
        (query.sum() + key.sum()).backward()
    if loss == "liger":
        labels = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        vocab_parallel_loss(zeros(rows, 1, model.vocab_size // tp), labels, None).sum().backward()
