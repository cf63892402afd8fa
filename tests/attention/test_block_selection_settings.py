"""Settings of block selection that can't be, and what it doesn't support, are rejected with one clear error."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from s2train.attention.block_selection import SCORERS
from s2train.attention.features import Feature
from s2train.attention.kind import lacking
from s2train.checkpoints.architecture import check_same_architecture
from s2train.checkpoints.folders import write_config
from s2train.checkpoints.hugging_face import exporting
from s2train.checkpoints.hugging_face.config import ExportConfig
from s2train.checkpoints.setting_changes import changes_between
from s2train.config import PretrainConfig
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.planning import check, compose_run, format_plan, hybrid_layout, preview
from tests.program import UNSAVED, metrics, run

CPU = Hardware("CPU", "cpu", 1 << 36, None)
H100 = Hardware("NVIDIA H100 80GB HBM3", "cuda", 80 << 30, None, (9, 0))


def config(selection: str = "top_k:3", *settings: str) -> PretrainConfig:
    return compose_run(
        ["+model=tiny_hybrid", "layout.layers=DE", f"+layout.kinds.E={{kind:block_selection,{selection}}}", *settings]
    )


@pytest.mark.parametrize(
    ("selection", "error"),
    [
        ("top_k:0", "layout.kinds.E.top_k=0: a query block selects at least one block"),
        ("top_k:14", "layout.kinds.E.top_k=14: a sequence of 256 tokens has 16 blocks of 16, of which 13"),
        ("window:2", "layout.kinds.E.top_k=null: nothing says how many"),
        (
            "top_k:2,share:0.1",
            "layout.kinds.E.share=0.1: top_k=2 says how many blocks too. Set layout.kinds.E.top_k=null too",
        ),
        ("share:0", "layout.kinds.E.share=0.0: is no share"),
        ("share:1.5", "layout.kinds.E.share=1.5: is no share"),
        ("top_k:1,window:1", "layout.kinds.E.window=1: a query block always keeps its own block and the one before"),
        ("top_k:1,window:17", "layout.kinds.E.window=17: a sequence of 256 tokens has 16 blocks of 16, and window"),
        ("top_k:1,sinks:20", "layout.kinds.E.sinks=20: a sequence of 256 tokens has 16 blocks"),
        ("top_k:1,scorer:mobo", "layout.kinds.E.scorer=mobo: unknown. Use moba, index or sea"),
        ("top_k:1,queries:own_block", "layout.kinds.E.queries=own_block: unknown. Use previous_block or first_token"),
        ("top_k:1,sampled_rows:0", "layout.kinds.E.sampled_rows=0: is too small"),
        ("top_k:1,loss_weight:-1", "layout.kinds.E.loss_weight=-1.0: is too small"),
        ("top_k:1,scorer:moba,loss_weight:3", "layout.kinds.E.loss_weight=3.0: scorer=moba does not read it, only"),
        ("top_k:1,scorer:moba,teacher:runs/x", "layout.kinds.E.teacher=runs/x: scorer=moba does not read it, only"),
        ("top_k:1,scorer:index,features:8", "layout.kinds.E.features=8: scorer=index does not read it, only sea"),
        ("top_k:1,topk:3", "layout.kinds.E.topk=3: no setting of kind block_selection. Did you mean top_k?"),
    ],
)
def test_settings_that_can_not_be_are_rejected(selection: str, error: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check(config(selection), 1, CPU)
    assert str(raised.value).startswith(error)


@pytest.mark.parametrize(
    ("selection", "remedy"), [("top_k:14", "Set it to 1 … 13."), ("top_k:2,window:14", "Set it to 1.")]
)
def test_a_top_k_beyond_the_sequence_gets_all_that_it_may_be(selection: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check(config(selection), 1, CPU)
    assert str(raised.value).endswith(f"beside window and sinks. {remedy}")


def test_packed_documents_are_rejected() -> None:
    message = r"index block-selection attention \(letter E\) doesn't support attention within documents"
    with pytest.raises(ConfigError, match=message):
        check(config("top_k:3", "data.attention_within_documents=true"), 1, CPU)


def test_chunks_of_context_parallel_ranks_that_can_not_sample_equally_many_rows_are_rejected() -> None:
    with pytest.raises(ConfigError) as raised:
        check(config("top_k:3,sampled_rows:6", "parallel.cp=2"), 2, CPU)
    problem = "layout.kinds.E.sampled_rows=6: parallel.cp=2 splits a sequence into 4 chunks"
    assert str(raised.value).startswith(problem)
    assert raised.value.remedy == "Set a multiple of 4."
    check(config("top_k:3,sampled_rows:8", "parallel.cp=2"), 2, CPU)


@pytest.mark.parametrize(
    ("setting", "blocks"),
    [("layout.block_size=256", "1 block of 256"), ("layout.block_size=128", "2 blocks of 128")],
)
def test_a_sequence_of_too_few_blocks_is_rejected_with_the_length_that_it_needs(setting: str, blocks: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check(config("top_k:1", setting), 1, CPU)
    assert f"a sequence of 256 tokens has {blocks}, and window and sinks always keep 3" in raised.value.problem
    needed = 3 * int(setting.split("=")[1]) + 1
    assert f"train.seq_length above {needed - 1}" in raised.value.remedy
    check(config("top_k:1", setting, f"train.seq_length={needed}"), 1, CPU)


@pytest.mark.parametrize("ranks", ["pp", "cp"])
def test_a_teacher_is_rejected_under_pipeline_and_context_parallelism(ranks: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check(config("top_k:3,teacher:runs/x", f"parallel.{ranks}=2"), 2, CPU)
    assert str(raised.value) == (
        f"layout.kinds.E.teacher=runs/x: a teacher doesn't run with parallel.{ranks}=2."
        f" Set parallel.{ranks}=1, or leave the teacher out."
    )


def test_a_model_of_two_teachers_is_rejected() -> None:
    other = "+layout.kinds.F={kind:block_selection,top_k:3,teacher:runs/y}"
    with pytest.raises(ConfigError, match=r"layout.kinds.F.teacher=runs/y: layout.kinds.E.teacher=runs/x names"):
        check(config("top_k:3,teacher:runs/x", other, "layout.layers=DEFF"), 1, CPU)
    check(config("top_k:3,teacher:runs/y", other, "layout.layers=DEFF"), 1, CPU)


def test_settings_that_fit_a_teacher_have_no_pipeline() -> None:
    small = replace(H100, memory=40 << 30)
    words = ["+model=7b_dense", "layer_backend=local", "layout.layers=DE", "model.num_query_groups=1"]
    words += ["parallel.tp=1", "parallel.sequence_parallel=false"]
    remedies = []
    for teacher in ("null", "runs/x"):
        cfg = compose_run([*words, f"+layout.kinds.E={{kind:block_selection,top_k:4,teacher:{teacher}}}"])
        remedies.append(str(preview(cfg, 1, small).remedy))
    assert ["parallel.pp" in remedy for remedy in remedies] == [True, False], remedies


def test_export_is_rejected(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "iter_0000001"
    checkpoint.mkdir(parents=True)
    write_config(config(), checkpoint / "config.yaml")
    with pytest.raises(ConfigError, match=r"index block-selection attention .* doesn't support export"):
        exporting.export(ExportConfig(str(checkpoint), str(tmp_path / "out")))
    assert lacking(hybrid_layout(config()).layers, Feature.EXPORT)


def test_a_scorer_whose_weights_the_checkpoint_lacks_is_rejected() -> None:
    changes = changes_between(config("top_k:3,scorer:moba"), config("top_k:3,scorer:index"))
    with pytest.raises(ConfigError, match=r"layout.kinds.E.scorer=index: .* was trained with .*scorer=moba"):
        check_same_architecture(changes, Path("iter_0000001"))


def test_a_gate_that_the_checkpoint_lacks_is_rejected() -> None:
    changes = changes_between(config("top_k:3,scorer:sea"), config("top_k:3,scorer:sea,mix_mean:true"))
    with pytest.raises(ConfigError, match=r"layout.kinds.E.mix_mean=true: .* was trained with .*mix_mean=false"):
        check_same_architecture(changes, Path("iter_0000001"))


def test_ranks_that_can_not_divide_the_scorers_weights_are_rejected() -> None:
    with pytest.raises(ConfigError, match=r"parallel.tp=4: "):
        check(config("top_k:3", "parallel.tp=4"), 4, CPU)


def test_the_plan_names_the_scorer_and_counts_exactly() -> None:
    text = format_plan(check(config("top_k:3,scorer:moba"), 1, CPU))
    assert "moba block-selection, keys chosen by the data: density 0.57" in text
    assert "exact" in text


def test_the_plan_counts_a_forward_pass_of_the_teacher_without_its_head() -> None:
    alone, taught = (check(config(f"top_k:3,teacher:{path}"), 1, CPU) for path in ("null", "runs/x"))
    model, length = taught.cfg.model, taught.cfg.train.seq_length
    head_dim = model.hidden_size // model.num_attention_heads
    projections = 2 * model.hidden_size**2 + 2 * model.hidden_size * model.num_query_groups * head_dim
    products = 4 * head_dim * model.num_attention_heads * (length + 1) / 2
    layer = 2 * (projections + 3 * model.hidden_size * model.ffn_hidden_size) + products
    (before,), (now,) = alone.phases, taught.phases
    assert now.flops - before.flops == pytest.approx(model.num_layers * layer)
    assert "teacher       runs/x: a forward pass on each micro batch" in format_plan(taught)
    assert "teacher" not in format_plan(alone)


def teacher_bytes(*settings: str, warm_up_steps: int = 0, micro_batch: int = 1) -> int:
    """What the plan counts for a teacher; it is linear in the micro batch but for the weights."""
    selection = f"top_k:3,sampled_rows:8,teacher:runs/x,warm_up_steps:{warm_up_steps}"
    cfg = config(selection, *settings, f"train.micro_batch_size={micro_batch}")
    return check(cfg, cfg.parallel.tp, CPU).memory.teacher


@pytest.mark.parametrize(("precision", "width"), [("bf16", 2), ("fp32", 4)])
@pytest.mark.parametrize("tp", [1, 2])
def test_the_plan_counts_the_teachers_weights_in_the_runs_precision(precision: str, width: int, tp: int) -> None:
    model = config().model
    division = [f"train.precision={precision}", f"parallel.tp={tp}"]
    dense = check(compose_run(["+model=tiny_hybrid", "layout.layers=D", *division]), tp, CPU)
    head = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size // tp
    weights = dense.rank_parameters - model.hidden_size - head  # without the final norm
    assert 2 * teacher_bytes(*division) - teacher_bytes(*division, micro_batch=2) == width * weights


def test_the_plan_counts_what_the_teacher_gives_each_layer() -> None:
    cfg = config()
    blocks, layers = cfg.train.seq_length // cfg.layout.block_size, cfg.model.num_layers // 2
    more = 4 * cfg.model.num_query_groups * layers * (blocks - 8) * blocks
    assert teacher_bytes(warm_up_steps=1, micro_batch=2) - teacher_bytes(micro_batch=2) == 2 * more
    assert check(config("top_k:3"), 1, CPU).memory.teacher == 0


def test_the_plan_counts_memory_that_the_teachers_ranks_address() -> None:
    division = ["layer_backend=local", "parallel.tp=2", "parallel.sequence_parallel=true"]
    over_nccl, by_copies = (
        preview(config("top_k:3,teacher:runs/x", *division, f"parallel.tp_comm_overlap={on}"), 2, H100).memory.teacher
        for on in ("false", "true")
    )
    cfg = config("top_k:3")
    tokens = cfg.train.micro_batch_size * cfg.train.seq_length
    assert by_copies - over_nccl == 2 * tokens * cfg.model.hidden_size * 4  # two slots in fp32


@pytest.mark.parametrize("scorer", SCORERS)
def test_ready_made_models_fit_one_gpu(scorer: str) -> None:
    for size in ("tiny", "125m"):
        plan = check(compose_run([f"+model={size}_{scorer}", "layer_backend=local"]), 1, H100)
        assert plan.cfg.model.name == f"{size}_{scorer}"
        assert f"{scorer} block-selection" in format_plan(plan)


@pytest.mark.slow
@pytest.mark.parametrize("scorer", SCORERS)
def test_a_ready_made_model_trains_as_it_stands(scorer: str, tmp_path: Path) -> None:
    """But for one step and one micro batch, in training as in evaluation."""
    short = ["train.exit_step=1", "train.global_batch_size=8", "evaluation.batches=1", UNSAVED]
    quiet = [f"run_dir={tmp_path}", "tracking.log_interval=1", "tracking.wandb=disabled"]
    run("pretrain.py", f"+model=tiny_{scorer}", *short, *quiet).succeeded()
    (loss,) = [record["loss"] for record in metrics(tmp_path)]
    assert loss == pytest.approx(math.log(320), abs=0.5)  # of a uniform guess among 320 tokens
