"""Memory of one layer's attention in the backward pass, by what computes it."""

from s2train.config import PretrainConfig
from s2train.costs.activations import attention_gradients
from s2train.costs.implementations import Implementations
from s2train.planning import compose_run, hybrid_layout

MILLION, KV_HEADS, DIM = 1_048_576, 8, 128
SETTINGS = [
    "+model=7b_hybrid",
    "parallel.tp=1",
    "parallel.sequence_parallel=false",
    f"train.seq_length={MILLION}",
    f"model.num_query_groups={KV_HEADS}",
]
HOPPER = Implementations((9, 0))


def nbytes(*settings: str) -> int:
    cfg: PretrainConfig = compose_run([*SETTINGS, *settings])
    return attention_gradients(cfg, 0, "cuda", hybrid_layout(cfg).layers, HOPPER)


def test_flash_attention_4_sums_gradients_of_all_gathered_keys_for_grouped_heads() -> None:
    sparse = nbytes("parallel.cp=8", "dense_attention=s2train", "layout.block_size=128")
    fa4 = nbytes("parallel.cp=8", "dense_attention=fa4", "layout.block_size=128")
    keys = MILLION * KV_HEADS * DIM
    queries = MILLION // 8 * 32 * DIM
    assert fa4 - sparse == (2 * 4 * keys + 4 * queries // 2) - (2 * 2 * keys + 4 * queries)


def test_ungrouped_heads_need_no_sums_of_keys() -> None:
    single = ["model.num_query_groups=32", "layout.layers=D"]
    fa4, ours = (nbytes(*single, f"dense_attention={name}") for name in ("fa4", "s2train"))
    assert fa4 == ours


def test_a_model_takes_the_larger_of_its_layers() -> None:
    dense, sparse, both = (nbytes("dense_attention=fa4", f"layout.layers={layers}") for layers in ("D", "S", "DS"))
    assert both == max(dense, sparse)
