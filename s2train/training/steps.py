"""Runs one step through Megatron's pipeline schedules."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.profiler import record_function

from s2train.config import PretrainConfig
from s2train.megatron.context_parallel.documents import divided_documents
from s2train.megatron.core_attention import packed_documents
from s2train.megatron.teacher import Teacher
from s2train.training.batches import Batch
from s2train.training.loss_by_position import position_bins, sum_by_position
from s2train.training.profile_table import DATA, RANGE

LossReport = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def token_loss(loss_mask: torch.Tensor, edges: list[int] | None, losses: torch.Tensor) -> LossReport:
    """Compute Megatron's three-part loss: sum [], positions [] int, report.

    Megatron normalises the three-part form by its second part; it would scale the two-part form by the context parallel
    size. That part counts all tokens, masked ones too, and `take_step` divides by the share that counts in the whole
    batch. By its own counted tokens, each rank's micro batch would have the same weight, however few they are.

    Args:
        loss_mask, losses: [b, s / cp], fp32.
        edges: edges of the position ranges to report (`position_edges`); None reports all positions as one range.
    """
    total = (losses.float() * loss_mask).sum()
    positions = torch.full((), loss_mask.numel(), dtype=torch.int, device=loss_mask.device)
    if edges is None:
        sums = torch.stack([total.detach(), loss_mask.sum()])[None]
    else:
        cp_rank, cp_size = (
            parallel_state.get_context_parallel_rank(),
            parallel_state.get_context_parallel_world_size(),
        )
        bins = position_bins(edges, cp_rank, cp_size, losses.device)
        sums = sum_by_position(losses.detach(), loss_mask, bins, len(edges) - 1)
    return total, positions, {"loss": sums}


def forward_step(
    batches: Iterator[Batch], model: torch.nn.Module, edges: list[int] | None = None, teacher: Teacher | None = None
) -> tuple[torch.Tensor, Callable[[torch.Tensor], LossReport]]:
    """Run Megatron's forward step on the next micro batch.

    A teacher runs before the model. Returns the per-token losses and the function that sums them.
    """
    with record_function(RANGE + DATA):
        batch = next(batches)
    tokens, packed = batch["tokens"], {}
    if "documents" in batch:
        packed["packed_seq_params"] = _documents(batch)
    if teacher is not None:
        teacher.teach(tokens, batch["position_ids"])
    losses = model(tokens, batch["position_ids"], None, labels=batch["labels"], **packed)
    return losses, partial(token_loss, batch["loss_mask"], edges)


def _documents(batch: Batch) -> PackedSeqParams:
    tokens, bounds = batch["tokens"], batch["documents"]
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return packed_documents(bounds, tokens.shape[1], tokens.device)
    rank = parallel_state.get_context_parallel_rank()
    return divided_documents(bounds, tokens.shape[1] * size, rank, size, tokens.device)


def run_step(
    cfg: PretrainConfig,
    chunks: list[DistributedDataParallel],
    batches: Sequence[Iterator[Batch]],
    *,
    forward_only: bool,
    batch_size: int,
    edges: list[int] | None = None,
    teacher: Teacher | None = None,
) -> torch.Tensor:
    """Run one global batch, micro batch by micro batch.

    Args:
        batch_size: sequences of this global batch.
        batches: an iterator of micro batches for each model chunk.
        edges: edges of the position ranges; None makes all positions one range.
        teacher: of the layers that learn from one; only training steps need it.
    Returns:
        Sums of loss (nats) and tokens, float64 [ranges, 2], the same on every rank.
    """
    train = cfg.train
    reports = get_forward_backward_func()(
        forward_step_func=partial(forward_step, edges=edges, teacher=teacher),
        data_iterator=batches if len(chunks) > 1 else batches[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=batch_size // (train.micro_batch_size * parallel_state.get_data_parallel_world_size()),
        seq_length=train.seq_length,
        micro_batch_size=train.micro_batch_size,
        decoder_seq_length=train.seq_length,
        forward_only=forward_only,
    )
    return _sum(reports, 1 if edges is None else len(edges) - 1)


def _sum(reports: list[dict[str, torch.Tensor]], ranges: int) -> torch.Tensor:
    """Sum over micro batches and ranks.

    Only the last pipeline stage has reports.
    """
    total = torch.zeros(ranges, 2, dtype=torch.float64, device=torch.cuda.current_device())
    for report in reports:
        total += report["loss"]
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            total,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return total
