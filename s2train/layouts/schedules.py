"""Layout schedules: how heads of a sparse layer get their offsets.

H is the number of query heads, H_kv of KV heads, and V the stride. A layer sees a far block (outside the local window)
if the block's column modulo V is the offset of some head, so a layer that sees everything needs all V offsets. V is
the pattern's period: the widest stride of context ranges (each range takes the offset modulo its own stride), or the
dilation of a dilated pattern (with distances in place of columns).

With grouped-query attention the H / H_kv query heads of a group attend to the same K/V head. If they share an offset,
one load of a K/V block serves all of them, but there are only H_kv distinct offsets instead of H.

kind          offset of head h of group g, l-th sparse layer     sees every block if      group shares loads
shifted       h mod V                                            V <= H, in each layer    no
strided       floor(h V / H): evenly spread over V               V <= H, in each layer    where V <= H_kv
grouped       floor(g V / H_kv), or g mod V where V <= H_kv      V <= H_kv, in each layer yes
rotating      (l H_kv + g) mod V: continues across sparse layers V <= r H_kv, in a run    yes
                                                                 of r sparse layers
homogeneous   0: an ablation                                     V = 1                    yes
explicit      as listed in `schedule.offsets`                    the lists have all V     as listed

Dense heads (`schedule.dense_heads`) see every block by themselves, with any kind of schedule.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from s2train.config import ScheduleConfig
from s2train.errors import ConfigError, from_to


@dataclass(frozen=True)
class ScheduleContext:
    """What an offset may depend on."""

    num_heads: int
    num_query_groups: int  # KV heads; divides num_heads
    stride: int  # blocks
    sparse_layer_index: int  # among the model's sparse layers, from 0

    @property
    def groups(self) -> list[int]:
        """Return the KV head of every query head."""
        return [head * self.num_query_groups // self.num_heads for head in range(self.num_heads)]


@dataclass(frozen=True)
class Schedule:
    """A kind of schedule and the coverage that it guarantees."""

    name: str
    offsets: Callable[[ScheduleContext], tuple[int, ...]]  # one per query head, in [0, stride)
    # (num_heads, num_query_groups, sparse layers in the run) -> the widest stride at which every block is seen
    widest_stride: Callable[[int, int, int], int]
    per_run: bool = False  # the guarantee covers the union of consecutive sparse layers, not each layer
    rows: int = 1  # the number of sparse layers must be a multiple of this

    def of_layer(self, num_heads: int, num_query_groups: int, sparse_layer: int) -> Callable[[int], tuple[int, ...]]:
        """Return the function from a pattern's period to a layer's offsets.

        Args:
            sparse_layer: number among the model's sparse layers, from 0.
        """

        def offsets(period: int) -> tuple[int, ...]:
            if period == 1:
                return (0,) * num_heads
            return self.offsets(ScheduleContext(num_heads, num_query_groups, period, sparse_layer))

        return offsets


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


EXPLICIT = "explicit"


def find_schedule(settings: ScheduleConfig) -> Schedule:
    """Return the schedule of these settings.

    Raises:
        ConfigError: the kind is unknown, or offsets are missing, belong to another kind, or are not lists of numbers.
    """
    kinds = [*SCHEDULES, EXPLICIT]
    if settings.kind not in kinds:
        nearest = difflib.get_close_matches(settings.kind, kinds, n=1, cutoff=0.0)[0]
        remedy = f"Did you mean {nearest}? Kinds: {', '.join(kinds)}."
        raise ConfigError("schedule.kind", settings.kind, "unknown", remedy)
    if settings.kind == EXPLICIT:
        return _explicit(settings.offsets)
    if settings.offsets is not None:
        problem = f"no setting of schedule.kind={settings.kind}, whose offsets are fixed"
        raise ConfigError("schedule.offsets", settings.offsets, problem, f"Set schedule.kind={EXPLICIT}.")
    return SCHEDULES[settings.kind]


def _explicit(given: Any) -> Schedule:
    """Make a schedule from listed offsets.

    There is one list, or one per sparse layer. The lists repeat over the sparse layers.
    """
    rows = given if isinstance(given, list) and given and isinstance(given[0], list) else [given]
    for row in rows:
        if not isinstance(row, list) or not row or not all(type(offset) is int for offset in row):
            remedy = "Write one offset per query head, 'schedule.offsets=[0,1,2,3]', or a list per sparse layer."
            raise ConfigError("schedule.offsets", given, "not a list of numbers", remedy)

    def offsets(context: ScheduleContext) -> tuple[int, ...]:
        number = context.sparse_layer_index % len(rows)
        row, shown = rows[number], f"[{number}]" if len(rows) > 1 else ""
        if len(row) != context.num_heads:
            problem = f"{len(row)} offsets for {context.num_heads} query heads"
            raise ConfigError(f"schedule.offsets{shown}", row, problem, f"Write {context.num_heads}.")
        if not all(0 <= offset < context.stride for offset in row):
            problem = f"an offset out of range for a pattern of period {context.stride}"
            raise ConfigError(f"schedule.offsets{shown}", row, problem, f"Write {from_to(0, context.stride - 1)}.")
        return tuple(row)

    return Schedule(EXPLICIT, offsets, lambda heads, groups, run: 0, per_run=len(rows) > 1, rows=len(rows))


def dense_head_numbers(count: int, num_heads: int) -> frozenset[int]:
    """Return which query heads are the `count` dense ones.

    They are evenly spread: any two runs of heads of one length, such as KV groups or tensor parallel ranks, differ by
    at most one dense head.

    Raises:
        ConfigError: `count` is not less than the number of heads.
    """
    if not 0 <= count < num_heads:
        remedy = f"Set it below {num_heads}, or write D in layout.layers for a dense layer."
        raise ConfigError("schedule.dense_heads", count, f"a sparse layer has {num_heads} heads", remedy)
    return frozenset(number * num_heads // count for number in range(count))
