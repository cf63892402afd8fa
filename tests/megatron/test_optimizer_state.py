"""Checkpoints of an offloaded Adam load in programs that have no such optimizer."""

import io
from unittest import mock

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from s2train.megatron.optimizer_state import remove_classes


def saved(state: dict[str, object]) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


class Adam(torch.optim.AdamW):
    """Unknown to torch's unpickler, as transformer-engine's is."""


def test_its_state_is_read_where_its_classes_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", mock.Mock())
    optimizer = HybridDeviceOptimizer(
        [torch.nn.Parameter(torch.zeros(3))],
        cpu_optimizer_cls=torch.optim.AdamW,
        gpu_optimizer_cls=Adam,
        overlap_cpu_optimizer_d2h_h2d=False,
        lr=0.5,
    )
    state = {"0": {"optimizer": [optimizer.state_dict()]}}  # of any nesting
    with pytest.raises(Exception, match="Adam"):
        torch.load(saved(state), weights_only=True)
    remove_classes(state)
    (group,) = torch.load(saved(state), weights_only=True)["0"]["optimizer"][0]["param_groups"]
    assert group["lr"] == 0.5
    assert optimizer.param_groups[0]["gpu_optimizer_cls"] is Adam  # what trains is left as it is
