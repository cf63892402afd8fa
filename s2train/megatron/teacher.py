"""The frozen dense model from which scorers learn."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from s2train.attention.hybrid import HybridLayout
from s2train.attention.selection.targets import row_mass
from s2train.attention.teacher import teacher_layout
from s2train.config import PretrainConfig
from s2train.megatron.block_attention import DenseCoreAttention
from s2train.megatron.block_selection import BlockSelectionCoreAttention
from s2train.megatron.layer_backends import Backend
from s2train.megatron.model import build_model, transformer_config, unwrap
from s2train.megatron.selection_losses import QueryPart, drawn_positions, mass_of_part


class TeacherCoreAttention(DenseCoreAttention):
    """Dense core attention that gives a student's layer its target.

    Attributes:
        student: the core attention of the same layer of the student, in a tuple: it is no submodule.
    """

    student: tuple[BlockSelectionCoreAttention]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, query_offset: int) -> Tensor:
        """Compute dense attention, and the student's target of this micro batch.

        The target is of all rows in the student's warm-up, afterwards of those that the student samples.
        """
        (student,) = self.student
        if not student.warms_up:
            at = drawn_positions(student, len(key), key.device)
            student.taught = row_mass(query[at], key, at, self.layer_layout.block_size, self.softmax_scale)
            return super().attend(query, key, value, query_offset)
        out, lse = self.attend_by_layout(query, key, value, self.full_layout(key), query_offset, return_lse=True)
        student.taught = mass_of_part(student, QueryPart(query, query_offset), key, lse)
        return out


class Teacher:
    """Runs the teacher on a micro batch before the student's forward pass.

    Args:
        model: from `build_teacher`, with its weights.
        chunks: of the student.
    """

    def __init__(self, model: GPTModel, chunks: Iterable[torch.nn.Module]) -> None:
        self.model = model.eval().requires_grad_(False)
        cores = (m for chunk in chunks for m in chunk.modules() if isinstance(m, BlockSelectionCoreAttention))
        students = {core.layer_number: core for core in cores}
        for core in model.modules():
            if isinstance(core, TeacherCoreAttention):
                core.student = (students[core.layer_number],)

    @torch.no_grad()
    def teach(self, tokens: Tensor, position_ids: Tensor) -> None:
        """Compute the targets of the student's layers for a micro batch.

        They stay until the next call.

        Args:
            tokens, position_ids: [b, s].
        """
        self.model(tokens, position_ids, None)


def build_teacher(cfg: PretrainConfig, hybrid: HybridLayout, backend: Backend, device: torch.device) -> GPTModel:
    """Build the teacher of a run, without a head.

    Its weights have no values yet: no random number is drawn.
    """
    cfg = replace(cfg, loss="torch", train=replace(cfg.train, recompute="none"))
    config = transformer_config(cfg)
    config.perform_initialization = False
    (chunk,) = build_model(cfg, config, teacher_layout(hybrid), backend, device, with_head=False)
    return unwrap(chunk)
