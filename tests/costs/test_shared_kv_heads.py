"""What the plan counts if there are more tensor parallel ranks than KV heads."""

from s2train.costs.activations import gathered_projection, layer_activations
from s2train.planning import compose_run, preview
from s2train.planning.targets import target_gpu

HEADS, KV_HEADS, DIM, FFN = 32, 8, 128, 11008
SETTINGS = ["+model=7b_hybrid", "train.seq_length=8192", "train.micro_batch_size=1", "parallel.sequence_parallel=true"]
SETTINGS += [f"model.ffn_hidden_size={FFN}", "model.vocab_size=8192", "train.global_batch_size=16"]


def bytes_of_layer(tp: int) -> int:
    """Saved by a layer besides the residual stream."""
    return layer_activations(compose_run([*SETTINGS, f"parallel.tp={tp}"]), stream=0, device_type="cuda")[0]


def test_ranks_keep_their_query_heads_and_one_whole_kv_head() -> None:
    for tp, values in ((8, HEADS // 8 + 2), (16, 1)):  # a view of the projection's output, or a copy
        queries, keys = HEADS // tp, 1
        heads = (queries + keys) + values + queries
        assert bytes_of_layer(tp) == 8192 * (heads * DIM * 2 + 4 * queries + 3 * 2 * FFN // tp)


def test_the_gathered_projection_has_the_heads_of_all_ranks() -> None:
    sizes = [gathered_projection(compose_run([*SETTINGS, f"parallel.tp={tp}"])) for tp in (8, 16)]
    assert sizes == [0, 8192 * (HEADS + 2 * KV_HEADS) * DIM * 2 * 17 // 16]


def test_the_predicted_step_includes_gathering_the_projection() -> None:
    def communication(groups: int) -> float:
        found = preview(
            compose_run([*SETTINGS, "parallel.tp=8", f"model.num_query_groups={groups}"]), 8, target_gpu("h100-80gb")
        ).prediction
        assert found is not None
        return found.time.communication

    assert communication(4) > communication(8) * 1.2
