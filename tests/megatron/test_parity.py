"""Every way to spread the model over processes trains it alike: same losses, same gradient norms.

All variants start from one checkpoint of a single process, so that resharding it is tested along the way.
"""

import json
from pathlib import Path

import pytest

from tests.program import UNSAVED, metrics, pretrain

STEPS = 2  # the second one with weights that the first one changed
TOLERANCE = 1e-5

pytestmark = [pytest.mark.slow]

OVERLAP = ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.tp_comm_overlap=true"]
VARIANTS = {
    "tp2": (2, ["parallel.tp=2"]),
    "tp2 with sequence parallel": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "pp2": (2, ["parallel.pp=2"]),
    "pp3 split by cost": (3, ["parallel.pp=3", "parallel.pipeline_split=cost"]),
    "vpp2": (2, ["parallel.pp=2", "parallel.vpp=2"]),
    "dp2": (2, ["parallel.overlap_grad_reduce=false"]),
    "dp2 with overlap": (2, []),
    "cp2": (2, ["parallel.cp=2"]),
    "cp2 overlapped": (2, ["parallel.cp=2", "parallel.cp_exchange=overlapped"]),
    "cp2 gathering": (2, ["parallel.cp=2", "parallel.cp_exchange=gather"]),
    "full recomputation": (1, ["train.recompute=full"]),
    "selective recomputation": (1, ["train.recompute=selective"]),
    "MLP recomputation": (1, ["train.recompute=mlp"]),
    "MLP recomputation, tp2": (2, ["train.recompute=mlp", "parallel.tp=2"]),
    "MLP recomputation, tp2 with sequence parallel": (
        2,
        ["train.recompute=mlp", "parallel.tp=2", "parallel.sequence_parallel=true"],
    ),
    "MLP recomputation, tp2 with overlap": (2, ["train.recompute=mlp", *OVERLAP]),
    "full recomputation, tp2 with overlap": (2, ["train.recompute=full", *OVERLAP]),
    "tp2 cp2": (4, ["parallel.tp=2", "parallel.cp=2", "parallel.sequence_parallel=true"]),
}


# What the plain optimizer does otherwise: gradients are summed whole, and its state is sharded by other rules.
PLAIN = ("tp2 with sequence parallel", "vpp2", "dp2")
# Others train so too: tests/attention/test_conformance.py divides a model of all kinds by these …
ELSEWHERE = ["tp2", "tp2 with sequence parallel", "pp2", "dp2 with overlap", "cp2 gathering"]
# … test_packed_documents.py one with packed documents, and the plain optimizer here.
ELSEWHERE += ["vpp2", "dp2", "full recomputation", "selective recomputation", "MLP recomputation"]
ELSEWHERE += ["MLP recomputation, tp2", "cp2"]  # within the next one
ELSEWHERE += ["full recomputation, tp2 with overlap"]  # test_overlapped_linear.py
CASES = [
    pytest.param("distributed", name, marks=pytest.mark.long if name in ELSEWHERE else []) for name in VARIANTS
] + [pytest.param("plain", name, marks=pytest.mark.long if "tp2" in name else []) for name in PLAIN]


def settings(optimizer: str) -> list[str]:
    """Norms of queries and keys have weights that tensor parallel ranks repeat."""
    return [
        "model.qk_norm=true",
        f"parallel.distributed_optimizer={str(optimizer == 'distributed').lower()}",
        f"train.steps={STEPS + 1}",
    ]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each optimizer a run of one process: a checkpoint after its first step, and STEPS more from there."""
    folders = {}
    for optimizer in ("distributed", "plain"):
        folders[optimizer] = tmp_path_factory.mktemp(optimizer)
        pretrain(folders[optimizer], *settings(optimizer), "checkpoint.interval=1").succeeded()
    return folders


def trace(folder: Path) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in metrics(folder)][-STEPS:]


@pytest.mark.parametrize(("optimizer", "variant"), CASES)
def test_trains_as_one_process_does(references: dict[str, Path], optimizer: str, variant: str, tmp_path: Path) -> None:
    processes, arguments = VARIANTS[variant]
    start = references[optimizer] / "checkpoints" / "iter_0000001"
    resumed = [*settings(optimizer), UNSAVED, f"checkpoint.resume={start}"]
    pretrain(tmp_path, *resumed, *arguments, processes=processes).succeeded()
    found, expected = trace(tmp_path), trace(references[optimizer])
    assert len(found) == len(expected) == STEPS
    for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
        assert norm == pytest.approx(expected_norm, rel=TOLERANCE)


@pytest.mark.long
@pytest.mark.parametrize("tp", [2, 4])
def test_balanced_heads_train_as_on_one_process(tp: int, tmp_path: Path) -> None:
    own = [f"train.steps={STEPS}", "optim.warmup_steps=1", "checkpoint.save=false"]
    own += ["schedule.placement=balanced", "schedule.dense_heads=1"]
    for processes in (1, tp):
        pretrain(tmp_path / str(processes), *own, f"parallel.tp={processes}", processes=processes).succeeded()
    for found, expected in zip(trace(tmp_path / str(tp)), trace(tmp_path / "1"), strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE)


def test_ranks_that_share_kv_heads_train_as_one_process_does_which_then_resumes(
    references: dict[str, Path], tmp_path: Path
) -> None:
    """The model has two KV heads. The four ranks take one step, then one process one more."""
    start = f"checkpoint.resume={references['distributed'] / 'checkpoints' / 'iter_0000001'}"
    shared = ["parallel.tp=4", "parallel.sequence_parallel=true", start, "train.exit_step=2"]
    for arguments, processes in ((shared, 4), ([], 1)):
        pretrain(tmp_path, *settings("distributed"), *arguments, processes=processes).succeeded()
    found = [value for pair in trace(tmp_path) for value in pair]
    assert len(found) == 2 * STEPS
    assert found == pytest.approx([v for pair in trace(references["distributed"]) for v in pair], rel=TOLERANCE)


def test_auto_exchange_is_recorded_and_trains_as_the_exchange_that_it_chooses(
    references: dict[str, Path], tmp_path: Path
) -> None:
    start = references["distributed"] / "checkpoints" / "iter_0000001"
    arguments = [*settings("distributed"), "parallel.cp=2", UNSAVED, f"checkpoint.resume={start}"]
    auto = pretrain(tmp_path / "auto", *arguments, "parallel.cp_exchange=auto", processes=2).succeeded()
    records = [json.loads(line) for line in (tmp_path / "auto" / "metrics.jsonl").read_text().splitlines()]
    (chosen,) = next(record["layers"] for record in records if record.get("event") == "cp exchange")
    assert chosen["is_chosen"]
    assert f"S: {chosen['mode']}; blocks are {chosen['share']:.1%} of a gather's bytes" in auto.out
    pretrain(tmp_path / "named", *arguments, f"parallel.cp_exchange={chosen['mode']}", processes=2).succeeded()
    assert trace(tmp_path / "auto") == trace(tmp_path / "named")
