"""On a GPU, every kind of attention trains, and resumes bit for bit; what changes memory alone changes no loss."""

from pathlib import Path

import pytest

from tests.program import metrics, run

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

KINDS = ("dense", "hybrid", "moba", "index", "sea", "hyper")
# Log every step, and evaluate none.
COMMON = ("tracking.log_interval=1", "optim.warmup_steps=1", "evaluation.interval=0")


def losses(run_dir: Path, *arguments: str) -> list[float]:
    """Train, and return the losses of all steps of this program."""
    run("pretrain.py", f"run_dir={run_dir}", *COMMON, *arguments).succeeded()
    return [record["loss"] for record in metrics(run_dir)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_repeats_the_losses_of_one_that_was_not_stopped(kind: str, tmp_path: Path) -> None:
    own = [f"+model=tiny_{kind}", "train.steps=12", "checkpoint.interval=6"]
    whole = losses(tmp_path / "whole", *own)
    assert whole[-1] < whole[0]
    start = f"checkpoint.resume={tmp_path / 'whole' / 'checkpoints' / 'iter_0000006'}"
    assert losses(tmp_path / "parts", *own, start) == whole[6:]


@pytest.mark.parametrize("kind", ["dense", "hybrid", "hyper"])
def test_attention_within_documents_trains(kind: str, tmp_path: Path) -> None:
    within = losses(
        tmp_path / "within", f"+model=tiny_{kind}", "train.steps=12", "data.attention_within_documents=true"
    )
    assert within[-1] < within[0]


def test_recomputation_repeats_the_first_loss_and_nearly_the_next(tmp_path: Path) -> None:
    own = ["+model=125m_hybrid", "train.steps=3", "train.global_batch_size=2", "train.micro_batch_size=1"]
    kept, *recomputed = (
        losses(tmp_path / mode, *own, f"train.recompute={mode}") for mode in ("none", "mlp", "selective", "full")
    )
    for other in recomputed:
        assert other[0] == kept[0]
        # dq is added up in any order, in fp32 before it is cast to bf16
        assert other == pytest.approx(kept, rel=1e-4)


def test_scorers_learn_from_a_dense_warm_up_and_from_a_teacher(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    losses(dense, "+model=tiny_dense", "train.steps=12")
    start = [f"checkpoint.resume={dense}", "checkpoint.weights_only=true", "train.freeze_trunk_steps=4"]
    own = ["+model=tiny_index", "train.steps=8", "layout.kinds.E.warm_up_steps=4", *start]
    alone = losses(tmp_path / "alone", *own)
    # while the trunk has the teacher's weights, both are the dense model
    assert losses(tmp_path / "taught", *own, f"+layout.kinds.E.teacher={dense}")[:4] == alone[:4]


def test_a_cold_starts_processes_compile_all_that_the_first_steps_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = {"TRITON_CACHE_DIR": tmp_path / "triton", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": tmp_path / "fa4"}
    for name, folder in caches.items():
        monkeypatch.setenv(name, str(folder))
    own = ["+model=125m_hybrid", "train.steps=2", "train.global_batch_size=2", "train.micro_batch_size=1", *COMMON]

    def start(name: str) -> str:
        done = run("pretrain.py", f"run_dir={tmp_path / name}", *own).succeeded()
        return done.out

    cold = start("cold")
    assert "processes beside the imports, seconds from their start: " in cold
    assert "compiled by the rank instead" not in cold
    (mark,) = caches["TRITON_CACHE_DIR"].glob("s2train_compiled/*")  # made before step 1
    late = [path for path in caches["TRITON_CACHE_DIR"].rglob("*.cubin") if path.stat().st_mtime > mark.stat().st_mtime]
    assert late == []
    assert "beside the imports" not in start("warm")
