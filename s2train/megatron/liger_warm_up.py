"""Runs Liger-Kernel's operations once, in the shapes of a run's steps."""

import torch
from torch import Tensor

from s2train.attention.weights import kv_heads_on_rank
from s2train.config import PretrainConfig, head_dim
from s2train.environment.dtypes import DTYPES
from s2train.environment.liger import ROTATION, SPLIT, SUMS, SWIGLU

_ROWS = 64


def compile_liger(cfg: PretrainConfig, operations: frozenset[str], loss: str, device: torch.device) -> None:
    """Run the operations and the loss of a run, forward and backward.

    Few rows, of zeros: most kernels depend on the number of rows only by its divisibility by 16. Those of residual sums
    get a step's rows. The loss `linear`, whose pieces depend on them, is left out.

    Args:
        operations: as `s2train.environment.liger.liger_operations` selects them.
        loss: as `s2train.environment.liger.choose_loss` does.
    """
    # not importable where Liger-Kernel is not installed
    from s2train.megatron.fused import swiglu
    from s2train.megatron.liger_losses import vocab_parallel_loss
    from s2train.megatron.rotation import Rotation

    model, parallel, batch = cfg.model, cfg.parallel, cfg.train.micro_batch_size
    tp, width = parallel.tp, head_dim(model)
    length = cfg.train.seq_length // parallel.cp
    rows, short = _ROWS + length * batch % 16, _ROWS + length % 16

    def zeros(*shape: int) -> Tensor:
        leaf = torch.zeros(shape, dtype=DTYPES[cfg.train.precision], device=device, requires_grad=True)
        return leaf.clone()  # some operations overwrite their inputs

    def run(*outputs: Tensor) -> None:
        torch.autograd.backward(outputs, [torch.zeros_like(x) for x in outputs])

    if SWIGLU in operations:
        run(swiglu(zeros(rows, 1, 2 * model.ffn_hidden_size // tp)))
    heads, groups = model.num_attention_heads // tp, kv_heads_on_rank(model.num_query_groups, tp)
    angles = torch.zeros(short, 1, 1, int(width * model.rotary_percent), device=device)
    if SPLIT in operations:
        run(*Rotation().split(zeros(short, batch, groups, (heads // groups + 2) * width), width, angles))
    elif ROTATION in operations:
        run(*Rotation()(zeros(short, batch, heads, width), zeros(short, batch, groups, width), angles))
    if SUMS in operations:
        from s2train.megatron.summed_norm import sum_and_norm  # needs one release of Liger-Kernel

        stream = (length // (tp if parallel.sequence_parallel else 1), batch, model.hidden_size)
        run(*sum_and_norm(zeros(*stream), zeros(*stream), zeros(model.hidden_size), model.norm_epsilon))
    labels = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    if loss == "liger":
        run(vocab_parallel_loss(zeros(rows, 1, model.vocab_size // tp), labels, None))
    elif loss == "in_place":
        from s2train.megatron.in_place_loss import loss_in_place  # needs one release of Liger-Kernel

        run(loss_in_place(zeros(rows, 1, model.vocab_size), labels))
