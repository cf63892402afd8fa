"""Place heads so that tensor parallel ranks share work evenly.

Heads may differ in density, and each rank holds consecutive heads.
"""

from collections.abc import Sequence

from s2train.layouts.counting import kept_key_blocks
from s2train.layouts.patterns import Pattern, known_blocks

_REFERENCE_BLOCKS = 1024  # constant: head positions are part of the model and must not depend on the run's settings


def place_balanced(heads: Sequence[Pattern], num_query_groups: int) -> tuple[Pattern, ...]:
    """Order a layer's heads so that ranks keep about equally many blocks.

    Blocks are counted over 1,024 blocks, or over the length of masks from a file. A KV group stays together if all its
    heads are alike, since they share their K/V loads.
    """
    num_blocks = known_blocks(heads, _REFERENCE_BLOCKS)
    kept = {pattern: int(kept_key_blocks([pattern], num_blocks).sum()) for pattern in set(heads)}
    costs = [kept[pattern] for pattern in heads]
    size = len(heads) // num_query_groups
    groups = [range(g * size, (g + 1) * size) for g in range(num_query_groups)]
    if all(len({heads[h] for h in group}) == 1 for group in groups):
        order = balanced_order([sum(costs[h] for h in group) for group in groups])
        return tuple(heads[h] for g in order for h in groups[g])
    return tuple(heads[h] for h in balanced_order(costs))


def balanced_order(costs: Sequence[float]) -> tuple[int, ...]:
    """Order `costs` so that contiguous equal parts cost about the same.

    Returns their indices. The order balances halves, then the halves of each half, and so on (thirds where the number
    is odd). It therefore suits every number of ranks that divides this way, since a checkpoint may be resumed with
    another number.
    """
    return tuple(_arrange(list(range(len(costs))), costs))


def _arrange(members: list[int], costs: Sequence[float]) -> list[int]:
    if len(members) == 1:
        return members
    parts = next(p for p in range(2, len(members) + 1) if len(members) % p == 0)
    room = len(members) // parts
    bins: list[list[int]] = [[] for _ in range(parts)]
    sums = [0.0] * parts
    # most expensive first, each to the part with the least total (Graham's rule), all parts equal in number
    for member in sorted(members, key=lambda index: -costs[index]):
        least = min((b for b in range(parts) if len(bins[b]) < room), key=lambda b: sums[b])
        bins[least].append(member)
        sums[least] += costs[member]
    return [member for part in bins for member in _arrange(part, costs)]
