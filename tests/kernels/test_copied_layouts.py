"""Schedule layouts copied from the host without reading the device."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from s2train.kernels import BlockLayout
from s2train.kernels.column_parts import column_parts
from s2train.kernels.hopper.backward_schedule import ScheduleOptions, backward_schedule
from s2train.kernels.hopper.forward_schedule import forward_schedule

BLOCKS, BLOCK, KV_HEADS = 160, 64, 2
LENGTH = BLOCKS * BLOCK
SIZES = (KV_HEADS, LENGTH, LENGTH, 0, True)
SCHEDULES: dict[str, Callable[[BlockLayout], Any]] = {
    "forward": lambda layout: forward_schedule(layout, causal=True, query_end=LENGTH, s_k=LENGTH),
    "backward": lambda layout: backward_schedule(layout, *SIZES),
    "second pairs": lambda layout: backward_schedule(layout, *SIZES, options=ScheduleOptions(second_pairs=True)),
    "parts of pairs": lambda layout: backward_schedule(layout, *SIZES, copies=1),
    "parts of columns": lambda layout: column_parts(layout, KV_HEADS, 1, BLOCK),
}


def long_columns() -> BlockLayout:
    """Every head keeps the diagonal, the first column and one more."""
    mask = torch.eye(BLOCKS, dtype=torch.bool).repeat(4, 1, 1)
    mask[:, :, 0] = True
    mask[range(4), :, range(1, 5)] = True
    return BlockLayout.from_mask(mask.tril(), BLOCK)


def tensors(found: Any) -> list[torch.Tensor]:
    values = found.values() if isinstance(found, dict) else [found]
    return [
        x for value in values for x in (tensors(value) if isinstance(value, dict) else [value]) if torch.is_tensor(x)
    ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_copied_layout_is_scheduled_without_reading_the_device(name: str) -> None:
    layout = long_columns()
    expected = tensors(asdict(SCHEDULES[name](layout)))
    found = tensors(asdict(SCHEDULES[name](layout.copied_to("meta"))))  # nothing can be read from a meta tensor
    assert [(x.device.type, x.dtype, x.shape) for x in found] == [("meta", x.dtype, x.shape) for x in expected]


def test_a_copy_to_its_own_device_is_the_layout() -> None:
    layout = long_columns()
    assert layout.copied_to("cpu") is layout


def test_schedules_of_very_many_pairs_are_made_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = long_columns()
    assert layout.copied_to("meta").on_host is layout
    monkeypatch.setattr("s2train.kernels.layout._SCHEDULED_ON_HOST", len(layout.row_columns) - 1)
    assert layout.copied_to("meta").on_host is None
