"""`plan.gpus=N` proposes divisions, best first, with a plan's own times and memory, and says why others lose."""

import json
from pathlib import Path

import pytest

from s2train.config import PretrainConfig
from s2train.environment.hardware import Hardware, gpu_rates
from s2train.errors import ConfigError
from s2train.planning import compose_run, format_proposal, preview, proposal, propose
from s2train.planning.division import Candidate, Search, can_divide
from s2train.planning.proposal_report import why_slower
from s2train.planning.run_layout import hybrid_layout
from s2train.planning.targets import NAMES, planned_for, rates_basis, target_gpu
from tests.program import ROOT, run

SCALING = Path("launch/results/2026-11-26-h100x2-scaling.json")
H100 = "plan.device=h100-80gb"


def proposed(*settings: str) -> Search:
    return propose(compose_run(settings))


@pytest.fixture(scope="module")
def seven() -> Search:
    return proposed("+model=7b_hybrid", "plan.gpus=8", H100)


def test_divisions_that_fit_come_fastest_first(seven: Search) -> None:
    times = [candidate.seconds for candidate in seven.fitting]
    assert times == sorted(times)
    assert len(seven.fitting) > 50
    assert all(candidate.memory.total <= 0.9 * seven.hardware.memory for candidate in seven.fitting)


def test_every_division_uses_all_gpus(seven: Search) -> None:
    for candidate in (*seven.fitting, *seven.too_large):
        tp, pp, cp = candidate.sizes
        assert tp * pp * cp * candidate.dp == 8
    assert {candidate.sizes for candidate in seven.fitting} > {(1, 1, 1), (2, 1, 1), (2, 2, 2), (8, 1, 1), (1, 8, 1)}


@pytest.mark.parametrize("place", [0, 7, -1])
def test_pasted_settings_plan_the_proposed_step_and_memory(seven: Search, place: int) -> None:
    candidate = seven.fitting[place]
    plan = preview(compose_run(["+model=7b_hybrid", *candidate.settings]), 8, seven.hardware)
    assert plan.prediction == candidate.prediction
    assert plan.memory == candidate.memory
    assert plan.data_parallel == candidate.dp


def test_what_is_proposed_does_not_depend_on_the_division_that_is_set(seven: Search) -> None:
    other = proposed("+model=7b_hybrid", "plan.gpus=8", H100, "parallel.tp=2", "parallel.pp=2", "parallel.vpp=2")
    assert other.fitting[0].settings == seven.fitting[0].settings


def test_tensor_parallel_groups_are_on_one_machine_each() -> None:
    model = ("+model=1b_hybrid", "model.num_attention_heads=24", "model.num_query_groups=12", "model.hidden_size=1536",
             "model.ffn_hidden_size=6144", "model.vocab_size=32256", "train.seq_length=12288",
             "train.global_batch_size=48")  # fmt: skip
    three, eight = (proposed(*model, f"plan.gpus={gpus}", H100) for gpus in (3, 24))
    assert {candidate.sizes[0] for candidate in three.fitting} == {1, 3}
    assert {candidate.sizes[0] for candidate in eight.fitting} == {1, 2, 4}  # 3 or 6 would leave some of a machine's 8


def test_overlap_that_the_gpus_can_not_serve_is_rejected() -> None:
    overlap = ("+model=1b_hybrid", "plan.gpus=2", "parallel.tp_comm_overlap=true")
    with pytest.raises(ConfigError, match=r"^parallel.tp_comm_overlap=true: NVIDIA L40S is linked by PCIe"):
        proposed(*overlap, "plan.device=l40s")
    assert 2 in {candidate.sizes[0] for candidate in proposed(*overlap, H100).fitting}


def test_one_gpu_overlaps_nothing_so_that_any_will_do() -> None:
    assert proposed("+model=125m_hybrid", "plan.gpus=1", "parallel.tp_comm_overlap=true", "plan.device=l40s").fitting


def test_a_long_context_on_eight_machines_is_divided() -> None:
    found = proposed("+model=7b_hybrid", "train.seq_length=131072", "plan.gpus=64", H100)
    assert len({candidate.sizes for candidate in found.fitting}) > 40
    assert max(candidate.sizes[0] for candidate in found.fitting) == 8  # within a machine
    text = format_proposal(found)
    assert "Divisions that don't fit with any settings:" in text
    assert "machines of 8 GPUs, each with 400 Gb/s, are assumed" in text


def test_the_measured_divisions_over_two_gpus_rank_as_measured_and_within_15_percent() -> None:
    rows = json.loads((ROOT / SCALING).read_text())["parts"]["scaling"]["models"]["1b_hybrid"]
    kernels = ["dense_attention=s2train", "elementwise=torch", "loss=torch"]  # of that day
    found = proposed("+model=1b_hybrid", "train.seq_length=32768", "train.global_batch_size=4", *kernels,
                     "plan.gpus=2", H100)  # fmt: skip
    ways = {(1, 1, 1): "dp2", (1, 1, 2): "cp2", (2, 1, 1): "tp2"}
    plain = [
        candidate
        for candidate in found.fitting
        if candidate.sizes in ways
        and (candidate.cfg.train.recompute, candidate.cfg.train.micro_batch_size) == ("none", 1)
    ]
    measured = sorted(ways.values(), key=lambda way: -rows[way]["tokens_per_s"])
    assert [ways[candidate.sizes] for candidate in plain] == measured
    for candidate in plain:
        speed = rows[ways[candidate.sizes]]["tokens_per_s"]
        assert candidate.prediction.tokens_per_s == pytest.approx(speed, rel=0.15)


def test_the_report_names_settings_to_paste_shortages_and_causes(seven: Search) -> None:
    text = format_proposal(seven)
    assert text.splitlines()[-1] == f"To use the first, add: {' '.join(seven.fitting[0].settings)}"
    faster = [candidate for candidate in seven.too_large if candidate.seconds < seven.fitting[0].seconds]
    least = min(faster, key=lambda candidate: candidate.memory.total)
    assert f"{(least.memory.total - seven.room) / 2**30:.1f} GiB too much" in text
    for cause in ("bubble ", "recompute +", "communication +"):
        assert cause in text


def one(found: Search, sizes: tuple[int, int, int], recompute: str) -> Candidate:
    return next(
        candidate
        for candidate in found.fitting
        if (candidate.sizes, candidate.cfg.train.recompute) == (sizes, recompute)
    )


@pytest.mark.parametrize(
    ("slower", "faster", "cause"),
    [
        (((1, 8, 1), "full"), ((1, 1, 1), "full"), "bubble"),
        (((1, 1, 1), "full"), ((2, 2, 2), "none"), "recompute"),
        (((8, 1, 1), "none"), ((2, 2, 2), "none"), "communication"),
    ],
)
def test_a_division_is_slower_by_what_it_does_more_of(
    seven: Search, slower: tuple[tuple[int, int, int], str], faster: tuple[tuple[int, int, int], str], cause: str
) -> None:
    best = one(seven, *faster)
    assert f": {cause} +" in why_slower(one(seven, *slower), best)
    assert why_slower(best, best) == ""


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (["plan.gpus=12", H100], r"plan\.gpus=12: machines of 8 GPUs .*Set plan\.gpus=8 or 16"),
        (["plan.gpus=0", H100], r"plan\.gpus=0: must be more than 0"),
        (
            ["plan.gpus=7", H100, "model.num_layers=4"],
            r"plan\.gpus=7: no division is possible; .*Set plan\.gpus=[68], or change",
        ),
        (["plan.gpus=3000000", H100], r"plan\.gpus=3000000: divisions over up to 16384 GPUs are planned"),
        (["plan.gpus=1", H100], r"plan\.gpus=1: no division fits into 71\.2 GiB .*Set plan\.gpus=\d+"),
        (["plan.gpus=8", H100, "optim.name=sgd"], r"parallel\.distributed_optimizer=true: "),
        (["plan.gpus=8", "plan.count=8", H100], r"plan\.gpus=8: plan\.count=8 plans the division that is set"),
        (["plan.gpus=8", H100, "train.precision=fp32"], r"train\.precision=fp32: .* in bf16 only"),
        (["plan.gpus=8", "plan.device=a100-80gb", "dense_attention=fa4"], r"dense_attention=fa4: compute capability 8"),
        (["plan.gpus=8", H100, "layout=moba_b64_k16"], r"layout\.layers=.*what the data choose"),
    ],
)
def test_a_request_that_cannot_be_met_is_rejected_with_a_remedy(settings: list[str], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        proposed("+model=7b_hybrid", *settings)


def test_a_number_that_cannot_divide_the_batch_is_dismissed_without_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose_run(["+model=7b_hybrid", "train.global_batch_size=1", "train.seq_length=4096"])
    monkeypatch.setattr("s2train.planning.division._divisions", lambda *_: pytest.fail("looked at every division"))
    assert not can_divide(cfg, hybrid_layout(cfg), 16_376, target_gpu("h100-80gb"))


def test_an_unknown_device_is_rejected_with_all_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"plan\.device=h100-90gb: unknown GPU") as caught:
        proposed("+model=7b_hybrid", "plan.gpus=8", "plan.device=h100-90gb")
    assert all(name in str(caught.value) for name in NAMES)


def test_a_machine_without_a_gpu_needs_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposal, "detect_own", lambda: Hardware("CPU", "cpu", 16 << 30))
    with pytest.raises(ConfigError, match=r"plan\.device=\(not set\): .*Set plan\.device to a100-40gb, "):
        proposed("+model=7b_hybrid", "plan.gpus=8")


def test_this_machines_gpu_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposal, "detect_own", lambda: target_gpu("h200"))
    assert proposed("+model=1b_hybrid", "plan.gpus=2").hardware.name == "NVIDIA H200"


def test_a_sweep_rejects_it() -> None:
    with pytest.raises(ConfigError, match="a sweep plans the division that is set"):
        planned_for(compose_run(["+model=1b_hybrid", "plan.gpus=2", H100]), 1)


def test_rates_that_were_not_measured_are_marked() -> None:
    assert rates_basis(target_gpu("a100-80gb")).startswith("assumed")
    for name in ("h100", "h200"):
        measured = rates_basis(target_gpu(name)).removeprefix("measured (").removesuffix(")").split(" and ")[0]
        assert list(ROOT.glob(measured))


@pytest.mark.parametrize("name", NAMES)
def test_the_guide_lists_each_device_with_its_rates(name: str) -> None:
    gpu = target_gpu(name)
    rates = gpu_rates(gpu.name)
    assert rates is not None
    basis = rates_basis(gpu).partition(",")[0].partition(" ")[0]
    row = f"| `{name}` | {rates.bf16 / 1e12:g} | {rates.memory / 1e12:g} | {rates.link / 1e9:g} | {basis} |"
    assert row in (ROOT / "docs" / "clusters.md").read_text()


def test_the_program_proposes_and_starts_nothing() -> None:
    done = run("pretrain.py", "+model=1b_hybrid", "plan=true", "plan.gpus=2", H100, processes=0)
    assert done.status == 0, done.err
    assert "To use the first, add: parallel.tp=" in done.out


def test_the_setting_is_a_plan_of_its_own() -> None:
    cfg = compose_run(["+model=1b_hybrid", "plan.gpus=2"])
    assert isinstance(cfg, PretrainConfig)
    assert cfg.plan.asked
