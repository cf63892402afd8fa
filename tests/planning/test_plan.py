"""Parameters, FLOPs and memory computed from a configuration match known numbers."""

import random
from dataclasses import replace

import pytest
import torch

from s2train.attention.hybrid import dense_layer
from s2train.attention.kind import LayerLayout
from s2train.attention.registry import LETTERS
from s2train.config import LayoutConfig, ModelConfig, ParallelConfig, PretrainConfig, TrainConfig
from s2train.costs.activations import stage_activations
from s2train.costs.attention import layout_nbytes
from s2train.costs.flops import token_flops
from s2train.costs.implementations import Implementations
from s2train.costs.memory import rank_memory
from s2train.costs.parameters import stage_parameters, total_parameters
from s2train.environment.hardware import Hardware, gpu_rates
from s2train.layouts.patterns import Dense
from s2train.planning import Plan, check, format_plan, hybrid_layout, make_plan, preview

GIB = 1024**3
H100 = Hardware("NVIDIA H100 80GB HBM3", "cuda", 85_017_624_576, gpu_rates("NVIDIA H100 80GB HBM3"))
LLAMA3_8B = ModelConfig("llama3", 32, 4096, 14336, 32, 8, vocab_size=128256)
MISTRAL_7B = ModelConfig("mistral", 32, 4096, 14336, 32, 8, vocab_size=32000)
TINYLLAMA = ModelConfig("tinyllama", 22, 2048, 5632, 32, 4, vocab_size=32000)


def config(model: ModelConfig = MISTRAL_7B, *, layers: str = "DSSS", **parallel: int | bool) -> PretrainConfig:
    return PretrainConfig(
        model=model,
        layout=LayoutConfig(layers=layers, block_size=128),
        parallel=ParallelConfig(**parallel),  # type: ignore[arg-type]
        train=TrainConfig(steps=1000, seq_length=8192, global_batch_size=64),
    )


def dense(model: ModelConfig) -> tuple[LayerLayout, ...]:
    """Dense layers, one for each of the model's."""
    return (LayerLayout(LETTERS["D"], (Dense(),) * model.num_attention_heads, 64),) * model.num_layers


def plan(cfg: PretrainConfig, world_size: int) -> Plan:
    return make_plan(cfg, hybrid_layout(cfg), world_size, H100)


@pytest.mark.parametrize(
    ("model", "published"),
    [(LLAMA3_8B, 8_030_261_248), (MISTRAL_7B, 7_241_732_096), (TINYLLAMA, 1_100_048_384)],
)
def test_parameters_are_those_of_published_models(model: ModelConfig, published: int) -> None:
    assert total_parameters(model, dense(model)) == published


def test_a_tied_embedding_counts_once() -> None:
    tied = replace(TINYLLAMA, tie_embeddings=True)
    assert total_parameters(TINYLLAMA, dense(tied)) - total_parameters(tied, dense(tied)) == 32000 * 2048


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(("tp", "pp", "vpp"), [(1, 1, None), (4, 1, None), (1, 2, None), (2, 4, 2)])
def test_ranks_together_hold_the_model_and_their_copies(tie: bool, tp: int, pp: int, vpp: int | None) -> None:
    model = replace(MISTRAL_7B, tie_embeddings=tie)
    parallel = ParallelConfig(tp=tp, pp=pp, vpp=vpp)
    held = tp * sum(
        stage_parameters(model, parallel, stage, dense(model)[: model.num_layers // pp]) for stage in range(pp)
    )
    norms = (2 * model.num_layers + 1) * model.hidden_size * (tp - 1)  # every tensor parallel rank has them
    table = model.vocab_size * model.hidden_size if tie and pp > 1 else 0  # on the first stage and the last
    assert held == total_parameters(model, dense(model)) + norms + table


def test_dense_flops_are_those_of_a_count_over_every_matrix_product() -> None:
    rng = random.Random()
    heads, groups, dim, ffn, vocab, layers, s = (rng.randint(2, 5) * 4, 4, 8, rng.randint(9, 90), 77, 3, 97)
    hidden = heads * dim
    flops = 0
    for _ in range(layers):
        for rows, columns in (
            *((hidden, heads * dim), (hidden, groups * dim), (hidden, groups * dim), (heads * dim, hidden)),
            *((hidden, ffn), (hidden, ffn), (ffn, hidden)),
        ):
            flops += 2 * s * rows * columns
        for _ in range(heads):
            for query in range(s):  # QK and PV of its causal keys
                flops += 2 * 2 * dim * (query + 1)
    flops += 2 * s * hidden * vocab
    cfg = config(ModelConfig("any", layers, hidden, ffn, heads, groups, vocab_size=vocab), layers="D")
    counted = token_flops(cfg.model, hybrid_layout(cfg), s)
    assert counted.sparse * s == pytest.approx(3 * flops, rel=1e-12)  # backward is twice the forward
    assert counted.dense == counted.sparse


@pytest.mark.parametrize("seq_length", [128, 200, 255])
def test_sparse_flops_are_those_of_a_count_over_every_kept_position(seq_length: int) -> None:
    cfg = config(ModelConfig("any", 4, 64, 96, 8, 4, vocab_size=64))
    cfg.layout.block_size, cfg.layout.pattern.local, cfg.layout.pattern.stride = 16, 2, 4
    hybrid = hybrid_layout(cfg)
    position = torch.arange(seq_length)
    causal = position[:, None] >= position[None, :]
    kept = 0
    for layer in hybrid.layers:
        for head in layer.heads:
            blocks = position // 16
            kept += int((head.keep(blocks[:, None], blocks[None, :]) & causal).sum())
    counted = token_flops(cfg.model, hybrid, seq_length)
    assert counted.attention * seq_length == pytest.approx(3 * kept * 4 * 8, rel=1e-12)
    assert counted.attention < counted.dense_attention


def test_weights_gradients_and_optimizer_take_18_bytes_a_parameter_in_bf16_and_16_in_fp32() -> None:
    cfg = config(TINYLLAMA, layers="DS")
    cfg.parallel.distributed_optimizer = False
    for precision, expected in (("bf16", (2, 4, 12)), ("fp32", (4, 4, 8))):
        cfg.train.precision = precision
        memory = plan(cfg, 4).memory
        assert (memory.weights, memory.gradients, memory.optimizer) == tuple(
            n * total_parameters(TINYLLAMA, dense(TINYLLAMA)) for n in expected
        )


def test_the_distributed_optimizer_is_shared_over_data_and_context_parallel_ranks() -> None:
    alone, shared = plan(config(cp=2), 2), plan(config(cp=2), 8)
    assert shared.memory.optimizer == alone.memory.optimizer // 4
    assert plan(config(cp=2, distributed_optimizer=False), 8).memory.optimizer == 2 * alone.memory.optimizer


def activations(cfg: PretrainConfig, stage: int = 0, micro_batches: int = 64) -> int:
    chunks = cfg.parallel.vpp or 1
    layers = (dense(cfg.model)[: cfg.model.num_layers // (cfg.parallel.pp * chunks)],) * chunks
    return stage_activations(cfg, stage, layers, micro_batches, "cuda", Implementations())


def test_activations_grow_with_the_sequence_not_its_square() -> None:
    cfg = config()
    once = activations(cfg)
    cfg.train.seq_length *= 4
    assert activations(cfg) == 4 * once


def test_sequence_and_context_parallel_split_activations() -> None:
    whole = activations(config())
    assert activations(config(tp=8, sequence_parallel=True)) == whole // 8
    assert whole // 8 < activations(config(tp=8)) < whole
    assert whole // 2 < activations(config(cp=2)) < 0.6 * whole  # K and V are gathered


def test_gradients_of_all_ranks_keys_are_counted_where_they_are_more_than_the_mlps() -> None:
    grown = []
    for kv_heads in (8, 16):
        cfg = config(replace(MISTRAL_7B, num_query_groups=kv_heads, vocab_size=512), cp=32)
        cfg.train.recompute, cfg.train.seq_length = "full", 2**20
        grown.append(activations(cfg))
    keys_and_values = 2 * 2**20 * 8 * 128 * 2
    assert grown[1] - grown[0] > 3 * keys_and_values  # saved, their gradients, and these once more for their ranks


@pytest.mark.parametrize("recompute", ["none", "selective", "mlp", "full"])
def test_what_our_backward_accumulates_in_fp32_is_counted_where_the_mlp_is_small(recompute: str) -> None:
    cfg = config(replace(MISTRAL_7B, ffn_hidden_size=256, vocab_size=64))
    cfg.train.recompute = recompute
    of_blocks = []
    for cfg.layout.block_size in (128, 64):
        of_blocks.append(activations(cfg))
    accumulator = 4 * cfg.train.seq_length * 32 * 128
    assert of_blocks[1] - of_blocks[0] == accumulator  # second pairs


def test_recomputation_keeps_less() -> None:
    cfg = config(cp=2)
    kept = []
    for recompute in ("none", "selective", "mlp", "full"):
        cfg.train.recompute = recompute
        kept.append(activations(cfg))
    assert kept[0] > kept[1] > 2 * kept[2]
    assert kept[2] > 2 * kept[3]


def test_with_recomputation_the_loss_and_a_layer_are_not_there_at_once() -> None:
    cfg = config(replace(MISTRAL_7B, vocab_size=8192))
    cfg.train.recompute, cfg.train.seq_length = "full", 131072
    small = activations(cfg)
    cfg.model = replace(cfg.model, vocab_size=512)
    assert activations(cfg) == small  # a layer's are more
    cfg.model = replace(cfg.model, vocab_size=65536)
    assert activations(cfg) > small


def test_what_lies_outside_of_torch_grows_with_the_groups_that_communicate() -> None:
    one, eight, spread = plan(config(), 1), plan(config(tp=8), 8), plan(config(pp=2, cp=2, tp=2), 8)
    assert one.memory.overhead < eight.memory.overhead < spread.memory.overhead < 6 * GIB


def test_memory_that_tensor_parallel_ranks_address_is_counted() -> None:
    over_nccl, by_copies = (plan(config(tp=8, sequence_parallel=True, tp_comm_overlap=on), 8) for on in (False, True))
    assert by_copies.memory.overhead - over_nccl.memory.overhead == 2 * 8192 * 4096 * 2  # two slots in bf16
    assert plan(config(tp_comm_overlap=True), 1).memory == plan(config(), 1).memory


def test_early_pipeline_stages_hold_more_micro_batches() -> None:
    cfg = config(pp=4)
    stages = [activations(cfg, stage) for stage in range(3)]
    assert stages[0] > stages[1] > stages[2]
    assert activations(cfg, 0, micro_batches=1) < activations(cfg, 2)
    assert activations(config(pp=4, vpp=2)) > stages[0]  # interleaving keeps more in flight


def test_the_plan_is_of_the_fullest_stage() -> None:
    cfg = config(pp=4, tp=2)
    found = plan(cfg, 8)
    assert found.rank_parameters == max(
        stage_parameters(cfg.model, cfg.parallel, stage, dense(cfg.model)[:8]) for stage in range(4)
    )
    stages, layouts = found.pipeline.stages, found.memory.layouts
    assert found.memory == rank_memory(cfg, hybrid_layout(cfg), 8, stages, layouts, "cuda", Implementations())
    assert found.memory.activations == activations(cfg, 0)


def test_layouts_are_counted_once_for_equal_layers() -> None:
    alike = plan(config(tp=8), 8).memory.layouts
    assert alike > 0
    rotating = config(tp=8)
    rotating.schedule.kind, rotating.layout.pattern.stride = "rotating", 16
    assert plan(rotating, 8).memory.layouts > alike


def test_dense_layers_have_layouts_within_documents_alone() -> None:
    cfg = config(tp=8, layers="D")
    assert plan(cfg, 8).memory.layouts == 0
    cfg.data.attention_within_documents = True
    assert plan(cfg, 8).memory.layouts > 0


def test_a_warm_up_has_the_layout_of_dense_layers() -> None:
    cfg = config(layers="DE")
    settings = cfg.layout.kinds["E"] = {"kind": "block_selection", "scorer": "index", "top_k": 4}
    assert plan(cfg, 1).memory.layouts == 0
    settings["warm_up_steps"] = 10
    assert plan(cfg, 1).memory.layouts == layout_nbytes(dense_layer(32, 128), 8192)


def test_hyper_attention_has_the_layout_of_dense_layers_within_documents_alone() -> None:
    cfg = config(layers="H")
    cfg.layout.kinds["H"] = {"kind": "hyper"}
    assert plan(cfg, 1).memory.layouts == 0
    cfg.data.attention_within_documents = True
    assert plan(cfg, 1).memory.layouts == layout_nbytes(dense_layer(32, 128), 8192)


@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_small_model_fits_and_reports_its_memory(tp: int, cp: int) -> None:
    cfg = config(ModelConfig("small", 4, 256, 512, 16, 4, vocab_size=512), tp=tp, cp=cp)
    found = check(cfg, 4, H100)
    assert found.fits
    assert found.memory.total < H100.memory
    assert found.data_parallel == 4 // (tp * cp)
    assert found.micro_batches * found.data_parallel == 64


def test_a_preview_has_the_number_of_processes_that_the_model_takes() -> None:
    found = preview(config(tp=8, sequence_parallel=True), 1, H100)
    assert found.world_size == 8
    assert found.fits
    assert preview(config(tp=8), 16, H100).world_size == 16


def test_processes_on_a_cpu_share_its_memory() -> None:
    cpu = Hardware("CPU", "cpu", 64 << 30)
    assert preview(config(tp=8), 1, cpu).hardware.memory == 8 << 30
    assert preview(config(tp=8), 8, cpu).hardware.memory == 64 << 30  # a started rank knows its own share
    assert preview(config(tp=8), 1, H100).hardware.memory == H100.memory


def test_the_report_contains_the_counts() -> None:
    text = format_plan(preview(config(tp=8, sequence_parallel=True), 8, H100))
    rows = text.partition("coverage")[0].splitlines()[1:]
    lines = dict(row.strip().split(maxsplit=1) for row in rows)
    assert lines["layers"] == "32: DSSSx8 (8 dense, 24 sparse)"
    assert lines["parameters"].startswith("7.24G, ")
    parts = ("weights", "gradients", "optimizer", "activations", "layouts", "overhead")
    assert sum(float(lines[part]) for part in parts) == pytest.approx(float(lines["total"].split()[0]), abs=0.005)
    assert "of 79.179 (NVIDIA H100 80GB HBM3)" in lines["total"]
    assert text.endswith("It fits.")
    assert "coverage at 8,192 tokens" in text


def test_the_report_suggests_overlapped_communication() -> None:
    found = preview(config(tp=8, sequence_parallel=True), 8, H100)
    overlapped = preview(config(tp=8, sequence_parallel=True, tp_comm_overlap=True), 8, H100)
    assert found.with_overlap == overlapped.prediction
    assert overlapped.with_overlap is None
    assert "per step with parallel.tp_comm_overlap=true" in format_plan(found)
    assert "with parallel.tp_comm_overlap=true" not in format_plan(overlapped)


@pytest.mark.parametrize("parallel", [{}, {"tp": 2}], ids=["one rank", "without sequence parallelism"])
def test_overlap_is_not_suggested_where_it_can_do_nothing(parallel: dict[str, int | bool]) -> None:
    assert preview(config(**parallel), 8, H100).with_overlap is None


def test_the_report_suggests_settings_that_fit() -> None:
    found = preview(config(), 1, H100)
    text = format_plan(found)
    assert not found.fits
    assert "It does not fit. Set " in text
    assert "parallel.tp=" in text
