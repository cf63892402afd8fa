"""How the heads of a sparse layer get their offsets: H query heads, H_kv KV heads, stride V.

A far block (outside the local window) is seen by a layer if its column, modulo V, is the offset of some head.
So a layer that sees everything needs all V offsets.

With grouped-query attention the H / H_kv query heads of a group attend to the same K/V head: where they share
an offset, one load of a K/V block serves them all, at the price of H_kv distinct offsets in place of H.

kind          offset of head h of group g, l-th sparse layer     sees every block if      group shares loads
shifted       h mod V                                            V <= H, in each layer    no
strided       floor(h V / H): evenly spread over V               V <= H, in each layer    where V <= H_kv
grouped       floor(g V / H_kv), or g mod V where V <= H_kv      V <= H_kv, in each layer yes
rotating      (l H_kv + g) mod V: goes on across sparse layers   V <= r H_kv, in a run    yes
                                                                 of r sparse layers
homogeneous   0: an ablation                                     V = 1                    yes
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from s2train.errors import ConfigError


@dataclass(frozen=True)
class ScheduleContext:
    """What an offset may depend on."""

    num_heads: int
    num_query_groups: int  # KV heads; divides num_heads
    stride: int  # blocks
    sparse_layer_index: int  # among the model's sparse layers, from 0

    @property
    def groups(self) -> list[int]:
        """The KV head of every query head."""
        return [head * self.num_query_groups // self.num_heads for head in range(self.num_heads)]


@dataclass(frozen=True)
class Schedule:
    """A kind of schedule and what it promises."""

    name: str
    offsets: Callable[[ScheduleContext], tuple[int, ...]]  # one per query head, in [0, stride)
    # (num_heads, num_query_groups, sparse layers in the run) -> the widest stride with every block seen
    widest_stride: Callable[[int, int, int], int]
    per_run: bool = False  # the promise holds for the union of a run of consecutive sparse layers, not for each


def _shifted(context: ScheduleContext) -> tuple[int, ...]:
    return tuple(head % context.stride for head in range(context.num_heads))


def _strided(context: ScheduleContext) -> tuple[int, ...]:
    return tuple(head * context.stride // context.num_heads for head in range(context.num_heads))


def _grouped(context: ScheduleContext) -> tuple[int, ...]:
    if context.stride <= context.num_query_groups:
        return tuple(group % context.stride for group in context.groups)
    return tuple(group * context.stride // context.num_query_groups for group in context.groups)


def _rotating(context: ScheduleContext) -> tuple[int, ...]:
    first = context.sparse_layer_index * context.num_query_groups
    return tuple((first + group) % context.stride for group in context.groups)


def _homogeneous(context: ScheduleContext) -> tuple[int, ...]:
    return (0,) * context.num_heads


SCHEDULES: dict[str, Schedule] = {
    schedule.name: schedule
    for schedule in (
        Schedule("shifted", _shifted, lambda heads, groups, run: heads),
        Schedule("strided", _strided, lambda heads, groups, run: heads),
        Schedule("grouped", _grouped, lambda heads, groups, run: groups),
        Schedule("rotating", _rotating, lambda heads, groups, run: groups * run, per_run=True),
        Schedule("homogeneous", _homogeneous, lambda heads, groups, run: 1),
    )
}


def find_schedule(kind: str) -> Schedule:
    """The schedule of this name.

    Raises:
        ConfigError: there is none.
    """
    if kind not in SCHEDULES:
        nearest = difflib.get_close_matches(kind, SCHEDULES, n=1, cutoff=0.0)[0]
        raise ConfigError("schedule.kind", kind, "unknown", f"Did you mean {nearest}? Kinds: {', '.join(SCHEDULES)}.")
    return SCHEDULES[kind]
