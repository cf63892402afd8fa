"""Which heads and random numbers tensor parallel ranks have, also with more ranks than KV heads."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from s2train.attention.kind import LayerLayout
from s2train.attention.registry import read_kind
from s2train.layouts.patterns import Dense
from s2train.megatron.hyper_attention import HyperCoreAttention
from s2train.megatron.layout_cache import LayoutCache

HEADS, GROUPS = 8, 2
LENGTH = 75
# it reads a part even of a short sequence
HYPER = {"kind": "hyper", "bucket": 16, "samples": 4, "projections": 8, "shortest": 16, "window": 0, "sinks": 0}


@dataclass(frozen=True)
class Ranks:
    """A process group that is only asked where this rank stands."""

    number: int
    own: int

    def size(self) -> int:
        return self.number

    def rank(self) -> int:
        return self.own


def core_of_rank(rank: int, tp: int) -> HyperCoreAttention:
    # as Megatron has it if ranks share KV heads
    sizes = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": HEADS}
    config = TransformerConfig(**sizes, num_query_groups=max(GROUPS, tp), attention_dropout=0.0)
    return HyperCoreAttention(
        config, 1, AttnMaskType.causal, "self", pg_collection=SimpleNamespace(tp=Ranks(tp, rank), cp=Ranks(1, 0)),
        layer_layout=LayerLayout(read_kind("H", HYPER, "layout.kinds.H"), (Dense(),) * HEADS, 16),
        num_query_groups=GROUPS, cache=LayoutCache(), backend="torch", seed=int(torch.randint(1 << 30, ())),
    )  # fmt: skip


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_each_rank_has_consecutive_query_heads_and_their_kv_heads(tp: int) -> None:
    cores = [core_of_rank(rank, tp) for rank in range(tp)]
    assert [head for core in cores for head in range(*core.heads)] == list(range(HEADS))
    assert {core.num_kv_heads for core in cores} == {max(1, GROUPS // tp)}
    assert {core.shape.num_query_groups for core in cores} == {GROUPS}


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_query_heads_read_the_same_keys_on_every_rank(tp: int) -> None:
    torch.manual_seed(seed := torch.seed() % 2**31)
    alone = core_of_rank(0, 1)
    query, key, value = (torch.randn(LENGTH, 1, heads, 8, dtype=torch.float64) for heads in (HEADS, GROUPS, GROUPS))
    expected, found = alone(query, key, value, None), []
    for rank in range(tp):
        core = core_of_rank(rank, tp)
        core.seed = alone.seed
        first, last = core.heads
        own = slice(first * GROUPS // HEADS, -(-last * GROUPS // HEADS))
        found.append(core(query[:, :, first:last], key[:, :, own], value[:, :, own], None))
    torch.testing.assert_close(torch.cat(found, -1), expected, msg=lambda text: f"seed {seed}: {text}")
    alone.seed += 1
    assert not torch.allclose(alone(query, key, value, None), expected)  # what is read is random
