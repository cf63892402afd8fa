"""Predicted step times, held against whole steps that were measured on H100s and H200s, and what they depend on."""

import copy
import csv
import functools
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from s2train.config import PretrainConfig
from s2train.costs.memory import GIB
from s2train.costs.step_time import MARGIN, Prediction
from s2train.environment.hardware import Hardware
from s2train.planning import Plan, compose_run, preview
from s2train.planning.targets import target_gpu
from s2train.study.settings import micro_batch
from s2train.study.variants import MODEL, PHASES, attention_settings
from tests.costs.earlier_kernels import earlier_seconds

CLOSE, EARLIER_CLOSE = 0.04, 0.06  # of a measured step, as the module's docstring says
RESULTS = Path(__file__).parents[2] / "launch" / "results"
H100, H200 = target_gpu("h100-80gb"), target_gpu("h200-141gb")
# What computed the steps that were measured before FlashAttention-4 and Liger-Kernel came.
BEFORE = ["dense_attention=cudnn", "elementwise=torch", "loss=torch"]
LAYERS = ["parallel.tp=1", "parallel.sequence_parallel=false", "train.micro_batch_size=1", "model.vocab_size=8192"]


@cache
def composed(*settings: str) -> PretrainConfig:
    return compose_run(settings)


def configured(*settings: str) -> PretrainConfig:
    """What the settings compose to. Files are composed once: the plain values here are set on a copy."""
    values = [s for s in settings if not s.startswith("+") and s.partition("=")[0] not in ("layout", "schedule")]
    cfg = copy.deepcopy(composed(*(s for s in settings if s not in values)))
    for setting in values:
        path, _, value = setting.partition("=")
        *sections, name = path.split(".")
        section = functools.reduce(getattr, sections, cfg)
        assert hasattr(section, name), setting
        setattr(section, name, yaml.safe_load(value))
    return cfg


@cache
def planned(*settings: str, processes: int = 1, gpu: Hardware = H100) -> Plan:
    return preview(configured(*settings), processes, gpu)


def predicted(*settings: str, processes: int = 1, gpu: Hardware = H100) -> Prediction:
    found = planned(*settings, processes=processes, gpu=gpu).prediction
    assert found is not None
    return found


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def measured_steps() -> Iterator[tuple[str, list[str], int, float]]:
    """Name, settings, GPUs and seconds of each."""
    for row in read("2026-11-26-h100-long-steps.json")["rows"]:
        settings = [
            "+model=7b_hybrid" if row["way"] == "hybrid" else "+model=7b_dense",
            *(["dense_attention=flash"] if "Flash" in row["way"] else []),
            f"model.num_layers={row['layers']}",
            f"train.seq_length={row['seq_length']}",
            f"train.global_batch_size={row['sequences_a_step']}",
            f"train.recompute={row['recompute']}",
        ]
        yield f"{row['way']} {row['seq_length']}", [*LAYERS, *settings], 1, row["step_s"]
    four = [*LAYERS, "+model=7b_hybrid", "model.num_layers=4", "train.seq_length=8192", "train.global_batch_size=4"]
    settings = {
        "local": ["layer_backend=local"],
        "local_other_kernels": ["layer_backend=local", "attention_backend=portable"],
        "te": ["layer_backend=te"],
        "te_fp8": ["layer_backend=te", "fp8=hybrid"],
    }
    for run in read("2026-11-26-h100-te.json")["runs"]:
        yield run["name"], [*four, *settings[run["name"]]], 1, run["step_time_s"]
    for name, settings, processes, row in steps_of_scaling():
        yield name, settings, processes, row["step_time_s"]
    for run in read("2026-11-22-h100-125m.json")["runs"]:
        settings = ["model.vocab_size=320", "train.global_batch_size=8", "train.micro_batch_size=4"]
        kernels = "attention_backend=portable"  # of that day
        yield run["name"], [f"+model={run['name']}", *settings, kernels], 1, run["step_time_s"]
    with (RESULTS / "2026-11-23-h100-layouts-alone.csv").open() as file:
        for row in csv.DictReader(file):
            # The others ran on a machine whose host they waited for: see the .md beside.
            if row["layout.layers"] in ("D", "S", "D4S13", "S13D4"):
                settings = ["+model=30m_hybrid", f"layout.layers={row['layout.layers']}"]
                yield f"30m {row['layout.layers']}", settings, 1, float(row["step_time_s"])


def steps_of_scaling() -> Iterator[tuple[str, list[str], int, dict]]:
    """Name, settings, GPUs and record of each measured by `launch/scaling.py` on one and two GPUs."""
    for model, found in read("2026-11-26-h100x2-scaling.json")["parts"]["scaling"]["models"].items():
        for way, row in found.items():
            # cuDNN is rejected under context parallel; s2train has its rate
            divided = {
                "cp2": ["parallel.cp=2", "dense_attention=s2train"],
                "tp2": ["parallel.tp=2", "parallel.sequence_parallel=true"],
            }
            batch = f"train.global_batch_size={4 if way == 'dp2' else 2}"
            settings = [f"+model={model}", "train.seq_length=32768", batch, *divided.get(way, [])]
            yield f"{model} {way}", settings, 1 if way == "one" else 2, row


def steps_of_four() -> Iterator[tuple[str, list[str], int, dict]]:
    """Name, settings, GPUs and record of each measured by `launch/scaling.py` on one to four H200s."""
    of_ranks = {"cp": "parallel.cp={}", "tp": "parallel.tp={} parallel.sequence_parallel=true loss=liger"}
    names = ["29-h200x4-scaling", "30-h200x4-scaling-micro-batch-2"]
    names += [f"30-h200x2-scaling{batch}{overlap}" for batch in ("", "-micro-batch-2") for overlap in ("", "-overlap")]
    for name in names:
        found = read(f"2026-11-{name}.json")
        measured = found["parts"]["scaling"]
        settings = ["+model=1b_hybrid", "train.seq_length=32768", *found.get("asked", {}).get("settings", [])]
        settings += [f"train.micro_batch_size={measured.get('micro_batch', 1)}"]
        settings += ["dense_attention=fa4", "elementwise=liger", "loss=in_place"]
        for way, row in measured["models"]["1b_hybrid"].items():
            kind, gpus = (way[:2], int(way[2:])) if way != "one" else ("", 1)
            batch = f"train.global_batch_size={2 * gpus if kind == 'dp' else 2}"
            yield f"{name} {way}", [*settings, batch, *of_ranks.get(kind, "").format(gpus).split()], gpus, row


def long_steps_of_four() -> Iterator[tuple[str, list[str], dict]]:
    """Name, settings and record of each measured by `launch/scaling.py --long` on four H200s."""
    divided = ["train.recompute=full", "parallel.tp=1", "parallel.sequence_parallel=false", "parallel.cp=4"]
    kernels = ["dense_attention=fa4", "elementwise=liger", "loss=in_place"]
    for name, row in read("2026-11-29-h200x4-long-steps.json")["parts"]["long"]["rows"].items():
        length = [f"train.seq_length={row['seq_length']}", f"model.num_layers={row['layers']}"]
        batch = ["train.global_batch_size=1", "train.micro_batch_size=1"]
        yield name, [f"+model={row['model']}", *length, *batch, *divided, *kernels], row


def steps_of_libraries() -> Iterator[tuple[str, list[str], dict]]:
    """Name, settings and record of each measured by `launch/check_libraries.py --parts steps`."""
    for path in sorted(RESULTS.glob("*-h100-library-steps.json")):
        for name, row in json.loads(path.read_text())["runs"].items():
            if "error" not in row:
                yield f"{path.stem} {name}", row["settings"], row


def long_steps_with_libraries(*names: str) -> Iterator[tuple[str, list[str], dict]]:
    """Name, settings and record of each measured by `launch/long_steps.py` since it records its settings."""
    for name in names:
        for row in read(f"{name}.json")["rows"]:
            settings = [
                "+model=7b_hybrid" if "hybrid" in row["way"] else "+model=7b_dense",
                *re.sub(r"\bbackend=", "layer_backend=", row["stack"]).split(),
                f"model.num_layers={row['layers']}",
                f"train.seq_length={row['seq_length']}",
                f"train.global_batch_size={row['sequences_a_step']}",
                f"train.recompute={row['recompute']}",
            ]
            yield f"{name} {row['way']} {row['seq_length']}", [*LAYERS, *settings], row


def steps_on_an_h200() -> Iterator[tuple[str, list[str], dict]]:
    """Name, settings and record of each that is not a window of a searched size."""
    for name, settings, row in long_steps_with_libraries("2026-11-29-h200-long-steps-te"):
        yield name, settings, {"step_time_s": row["step_s"], "peak_memory_gib": row["peak_gib"]}
    for name, row in read("2026-11-29-h200-library-steps-fused.json")["runs"].items():
        found = {"step_time_s": row["step_s"], "peak_memory_gib": row["peak_bytes"] / GIB}
        yield f"1B {name}", row["settings"], found


def settings_of_the_study(variant: str, phase: str, gpus: int = 1, loss: str = "in_place") -> list[str]:
    """Settings of a run of 131,072 tokens a step."""
    length = PHASES[phase].length
    sequences = 131_072 // length
    return [
        *MODEL,
        *attention_settings(variant, PHASES[phase]),
        f"train.seq_length={length}",
        f"train.global_batch_size={sequences}",
        f"train.micro_batch_size={micro_batch(length, sequences, gpus)}",
        *("dense_attention=fa4", "elementwise=liger", f"loss={loss}"),
    ]


def steps_of_the_study(path: Path) -> Iterator[tuple[str, list[str], dict]]:
    """Name, settings and record of each measured by `launch/quality_study.py speed` that is no window."""
    loss = "liger" if "11-28" in path.name else "in_place"
    for name, row in json.loads(path.read_text())["rows"].items():
        variant, phase, _ = name.rsplit("-", 2)
        if not variant.startswith("window"):
            yield name, settings_of_the_study(variant, phase, loss=loss), row


def runs_of_the_study() -> Iterator[tuple[str, list[str], int, dict]]:
    """Name, settings, GPUs and record of each run trained by `launch/quality_study.py`."""
    folder = RESULTS / "2026-11-29-h200-quality-125m"
    for path in sorted(folder.glob("*-seed?.json")):
        found = json.loads(path.read_text())
        assert found["recipe"]["batch_tokens"] == 131_072
        run, gpus = found["run"], found["gpus"]
        yield path.stem, settings_of_the_study(run["variant"], run["phase"], gpus), gpus, found["summary"]
    for name, settings, row in steps_of_the_study(folder / "speed.json"):
        yield f"{name} first steps", settings, 1, row


LIBRARY_STEPS = list(steps_of_libraries())
LONG_STEPS = list(long_steps_with_libraries("2026-11-28-h100-long-steps-fa4", "2026-11-28-h100-long-steps-8k-128k"))
SPEED_STEPS = list(steps_of_the_study(RESULTS / "2026-11-28-h200-quality-speed.json"))
H200_STEPS = list(steps_on_an_h200())
STUDY_STEPS = list(runs_of_the_study())
FOUR_STEPS = list(steps_of_four())
LONG_STEPS_OF_FOUR = list(long_steps_of_four())
EARLIER = [(name, [*BEFORE, *own], gpus, H100, seconds) for name, own, gpus, seconds in measured_steps()]
EARLIER += [(name, settings, 1, H100, row["step_s"]) for name, settings, row in [*LIBRARY_STEPS, *LONG_STEPS]]
EARLIER += [(f"2026-11-28 {name}", settings, 1, H200, row["step_time_s"]) for name, settings, row in SPEED_STEPS]
STEPS = [(name, settings, 1, row) for name, settings, row in H200_STEPS] + STUDY_STEPS + FOUR_STEPS
TE_ADAM = ["local", "local_other_kernels", "te", "te_fp8"]
WAITED = ["29-h200x4-scaling cp4", "homogeneous-16k-seed1", "dense-16k-seed1"]  # for a slow host
WARNED = ["sparse-16k-seed1"]  # of a slow host, and did not wait
PEAKS = [(name, settings, 1, H100, row["peak_bytes"]) for name, settings, row in LIBRARY_STEPS]
PEAKS += [(name, settings, 1, H100, row["peak_gib"] * GIB) for name, settings, row in LONG_STEPS]
PEAKS += [(name, own, 1, H200, row["peak_memory_gib"] * GIB) for name, own, row in [*SPEED_STEPS, *H200_STEPS]]
PEAKS += [(f"125m {name}", own, n, H200, row["peak_memory_gib"] * GIB) for name, own, n, row in STUDY_STEPS]
PEAKS += [(name, [*BEFORE, *own], n, H100, row["memory_gib"] * GIB) for name, own, n, row in steps_of_scaling()]
PEAKS += [(f"H200 {name}", own, n, H200, row["memory_gib"] * GIB) for name, own, n, row in FOUR_STEPS]


@pytest.mark.parametrize("step", STEPS, ids=[step[0] for step in STEPS])
def test_a_step_measured_with_todays_kernels_is_met_closely(step: tuple[str, list[str], int, dict]) -> None:
    name, settings, gpus, row = step
    found = predicted(*settings, processes=gpus, gpu=H200)
    if name in WAITED:
        assert found.slow_host_s is not None
        assert found.time.total < row["step_time_s"]
    else:
        assert (found.slow_host_s is not None) == (name in WARNED)
        assert found.time.total == pytest.approx(row["step_time_s"], rel=CLOSE)


@pytest.mark.parametrize("step", LONG_STEPS_OF_FOUR, ids=[step[0] for step in LONG_STEPS_OF_FOUR])
def test_a_long_step_of_four_context_parallel_ranks_is_met_within_the_margin(step: tuple[str, list[str], dict]) -> None:
    _, settings, row = step
    found = predicted(*settings, processes=4, gpu=H200)
    assert found.time.total == pytest.approx(row["step_time_s"], rel=MARGIN)


@pytest.mark.parametrize("step", EARLIER, ids=[step[0] for step in EARLIER])
def test_a_step_measured_with_earlier_kernels_is_met_by_what_they_took(
    step: tuple[str, list[str], int, Hardware, float],
) -> None:
    name, settings, gpus, gpu, seconds = step
    plan = planned(*settings, processes=gpus, gpu=gpu)
    assert plan.prediction is not None
    day = "2026-11-28" if "11-28" in name else "2026-11-26"
    more = earlier_seconds(plan, day, te_adam=name in TE_ADAM)
    assert plan.prediction.time.total + more == pytest.approx(
        seconds, rel=MARGIN if name.startswith("30m") else EARLIER_CLOSE
    )


@pytest.mark.parametrize("peak", PEAKS, ids=[peak[0] for peak in PEAKS])
def test_memory_of_a_measured_step_is_planned_within_the_margin(
    peak: tuple[str, list[str], int, Hardware, float],
) -> None:
    _, settings, processes, gpu, nbytes = peak
    memory = planned(*settings, processes=processes, gpu=gpu).memory
    assert memory.total - memory.overhead == pytest.approx(nbytes, rel=MARGIN)


SEVEN = ["+model=7b_hybrid"]
LIGER = ["elementwise=liger", "loss=liger"]
# Seconds of single operations at the 1B model's sizes over 32k tokens, on an H200.
SINGLE = {
    (row["operation"], row["way"]): row["ms"]["both"] / 1e3 for row in read("2026-11-30-h200-elementwise.json")["times"]
}
SUM = SINGLE["sums", "torch"] - SINGLE["sums", "liger"]  # saved by a fused sum


def test_settings_here_are_what_they_compose_to() -> None:
    _, settings, *_ = LONG_STEPS[0]
    assert configured(*settings) == compose_run(settings)
    assert configured(*settings) != composed("+model=7b_hybrid")


def test_faster_kernels_make_the_predicted_step_shorter() -> None:
    one = ["+model=1b_hybrid", "train.seq_length=32768", "train.global_batch_size=2"]
    before = predicted(*one, *BEFORE).time
    liger = predicted(*one, "dense_attention=cudnn", *LIGER).time
    assert 0.35 * before.elementwise < liger.elementwise < 0.45 * before.elementwise
    assert liger.attention == before.attention
    linear = predicted(*one, "dense_attention=cudnn", "elementwise=liger", "loss=linear").time
    assert linear.linear > liger.linear  # the logits again
    fa4 = predicted(*one, "dense_attention=fa4", *LIGER).time
    assert before.attention * 0.8 < fa4.attention < before.attention


def test_fused_elementwise_work_is_the_sum_of_single_operations() -> None:
    one = ["+model=1b_hybrid", "train.seq_length=32768", "train.global_batch_size=2", "elementwise=liger"]
    found = predicted(*one, "loss=in_place", gpu=H200).time.elementwise
    layer = SINGLE["swiglu", "liger"] + 2 * SINGLE["sums", "liger"] + SINGLE["split", "s2train"]
    assert found == pytest.approx(2 * (16 * layer + SINGLE["loss in_place", "liger"]), rel=0.03)


def test_a_wider_mlp_takes_more_elementwise_time_by_any_kernel() -> None:
    one = ["+model=1b_hybrid", "train.seq_length=32768", "train.global_batch_size=2"]
    for kernels in ("elementwise=torch", "elementwise=liger", "elementwise=torch layer_backend=te fp8=hybrid"):
        usual, wide = (
            predicted(*one, *kernels.split(), f"model.ffn_hidden_size={width}", gpu=H200).time.elementwise
            for width in (8192, 16384)
        )
        assert wide - usual == pytest.approx(2 * 16 * SINGLE["swiglu", "liger"], rel=0.1), kernels


def test_sums_with_norms_save_time_unless_norms_are_recomputed() -> None:
    one = ["+model=1b_hybrid", "train.seq_length=32768", "train.global_batch_size=1", "elementwise=liger"]
    none, full, mlp = (
        predicted(*one, f"train.recompute={name}", gpu=H200).time.elementwise for name in ("none", "full", "mlp")
    )
    assert mlp - none == pytest.approx(2 * 16 * SUM, rel=0.02)
    assert mlp - full == pytest.approx(16 * SUM, rel=0.02)  # a layer's second sum is the end of what is recomputed


def test_less_memory_is_planned_where_logits_are_not_copied() -> None:
    one = ["+model=1b_hybrid", "train.seq_length=32768", "train.global_batch_size=2", "elementwise=torch"]
    ways = ("torch", "liger", "in_place", "linear")
    torchs, ligers, in_place, linear = (planned(*one, f"loss={way}").memory.activations for way in ways)
    logits = 32768 * 32768
    assert torchs - ligers == 6 * logits
    assert torchs - in_place > 6 * logits
    assert torchs - linear > 6 * logits


def test_a_deterministic_dense_backward_takes_longer() -> None:
    dense = ["+model=1b_dense", "train.seq_length=32768", "dense_attention=fa4"]
    sure = predicted(*dense, "train.deterministic=true").time.attention
    assert 1.05 * predicted(*dense).time.attention < sure < 1.2 * predicted(*dense).time.attention


def test_the_parts_are_the_step_and_tell_its_speed() -> None:
    found = predicted("+model=1b_hybrid", "train.seq_length=32768", "train.global_batch_size=4", processes=2)
    assert sum(found.time.parts().values()) == pytest.approx(found.time.total)
    assert found.tokens_per_s == pytest.approx(4 * 32768 / found.time.total)
    assert 0.3 < found.mfu < 0.6
    assert found.caveats == ()


def test_an_h200_was_measured_too() -> None:
    one = ["+model=1b_hybrid", "train.seq_length=32768", "train.global_batch_size=2"]
    ours, theirs = predicted(*one), predicted(*one, gpu=H200)
    assert theirs.caveats == ()
    assert theirs.time.attention == ours.time.attention
    assert theirs.time.linear > ours.time.linear  # as profiled


def test_another_gpu_is_an_estimate_by_its_peaks() -> None:
    ours, theirs = predicted(*SEVEN, processes=8), predicted(*SEVEN, processes=8, gpu=target_gpu("a100-80gb"))
    assert theirs.time.linear == pytest.approx(ours.time.linear * 989 / 312)
    assert theirs.time.optimizer == pytest.approx(ours.time.optimizer * 3.35 / 2.039)
    assert any("scaled by the peak rates of NVIDIA A100" in caveat for caveat in theirs.caveats)


def test_divisions_that_nobody_measured_are_estimates() -> None:
    assert "parallel.tp above 4" in predicted(*SEVEN, processes=8).caveats[0]
    pipeline = predicted("+model=1b_hybrid", "parallel.pp=2", processes=2)
    assert "pipeline" in pipeline.caveats[0]
    overlap = ("+model=1b_hybrid", "parallel.tp_comm_overlap=true")
    assert not predicted(*overlap).caveats  # one rank communicates nothing
    of_four = predicted(*overlap, "parallel.tp=4", "parallel.sequence_parallel=true", processes=4)
    assert "tp_comm_overlap" in of_four.caveats[0]
    one = predicted("+model=1b_hybrid", "parallel.tp=1", "parallel.sequence_parallel=false", processes=8)
    assert one.caveats == ("no data parallelism above 4 was measured",)
    assert any("machines of 8" in caveat for caveat in predicted(*SEVEN, processes=16).caveats)


def test_stages_wait_for_one_another_and_less_with_virtual_ones() -> None:
    whole = predicted("+model=1b_hybrid", processes=2)
    one, two = (predicted("+model=1b_hybrid", "parallel.pp=4", *vpp, processes=4) for vpp in ([], ["parallel.vpp=4"]))
    assert whole.time.pipeline == 0
    assert one.time.pipeline > two.time.pipeline > 0


def test_recomputation_and_tensor_parallel_cost_time() -> None:
    plain, again = predicted(*SEVEN, processes=8), predicted(*SEVEN, "train.recompute=full", processes=8)
    assert again.time.recomputation > 0.2 * plain.time.linear
    apart = predicted(*SEVEN, "parallel.sequence_parallel=false", processes=8)
    assert apart.time.elementwise > plain.time.elementwise


def test_recomputing_the_mlp_repeats_its_products_and_no_attention() -> None:
    found = [predicted(*SEVEN, f"layout.layers={layers}", "train.recompute=mlp", processes=8) for layers in "DS"]
    assert found[0].time.attention > 2 * found[1].time.attention
    assert found[0].time.recomputation == found[1].time.recomputation
    plain, whole = (predicted(*SEVEN, f"train.recompute={name}", processes=8) for name in ("none", "full"))
    assert 0.2 * plain.time.linear < found[1].time.recomputation < whole.time.recomputation
    assert plain.time.communication < found[1].time.communication < whole.time.communication


def test_only_full_recomputation_repeats_norms_of_queries_and_keys() -> None:
    own = [*SEVEN, "elementwise=torch"]  # else they change how heads are rotated too
    for name, more in (("mlp", False), ("full", True)):
        without, normed = (
            predicted(*own, f"train.recompute={name}", f"model.qk_norm={on}", processes=8) for on in ("false", "true")
        )
        assert normed.time.elementwise > without.time.elementwise
        assert (normed.time.recomputation > 1.001 * without.time.recomputation) == more


APART = ["parallel.overlap_grad_reduce=false"]
CARD = 0.69 * 50e9  # bytes/s


def test_machines_are_joined_by_a_slower_network() -> None:
    eight = [*SEVEN, *APART, "parallel.tp=8"]
    one, two = (predicted(*eight, f"train.global_batch_size={8 * n}", processes=8 * n) for n in (1, 2))
    parameters = planned(*eight, processes=8).rank_parameters
    assert two.time.communication - one.time.communication == pytest.approx(3 * parameters / CARD, rel=1e-6)


def test_gpus_of_a_machine_share_their_network_cards() -> None:
    near, far = (
        predicted("+model=1b_hybrid", *APART, f"train.global_batch_size={16 * gpus}", processes=gpus)
        for gpus in (8, 16)
    )
    assert near.time.communication < far.time.communication < 1.3 * near.time.communication


def test_work_hides_what_data_parallel_ranks_move() -> None:
    eight = [*SEVEN, "parallel.tp=8", "train.global_batch_size=16"]
    hidden, apart = (predicted(*eight, *extra, processes=16).time.communication for extra in ([], APART))
    assert hidden < apart


def test_stages_send_activations_between_machines() -> None:
    def between(processes: int) -> float:
        staged = [*SEVEN, "parallel.tp=2", "parallel.pp=4", f"train.global_batch_size={8 * processes}"]
        return predicted(
            *staged, *APART, "parallel.distributed_optimizer=false", processes=processes
        ).time.communication

    sent = 64 * 2 * 32768 * 4096 * 2 / 2  # 64 micro batches, forth and back, over two tensor parallel ranks
    assert between(8) > sent / (0.69 * 450e9)
    assert between(16) - between(8) > sent / CARD - sent / (0.69 * 450e9)


def test_recomputation_repeats_the_exchange_of_keys() -> None:
    divided = [*SEVEN, "parallel.tp=1", "parallel.sequence_parallel=false", "parallel.cp=8", "train.seq_length=131072"]
    once, again = (
        predicted(*divided, f"train.recompute={name}", processes=8).time.communication for name in ("none", "full")
    )
    assert 1.2 * once < again < 1.5 * once


def test_a_small_layer_waits_for_a_slow_host() -> None:
    assert predicted("+model=125m_hybrid", "train.micro_batch_size=1").slow_host_s is not None
    assert predicted(*SEVEN, processes=8).slow_host_s is None


def test_a_slow_host_is_slower_for_several_ranks() -> None:
    """Four ranks of the 1B model waited, and with micro batches of two did not."""
    four = ["+model=1b_hybrid", "train.seq_length=32768", "parallel.cp=4"]
    waiting, larger = (
        predicted(*four, f"train.micro_batch_size={size}", processes=4, gpu=H200).slow_host_s for size in (1, 2)
    )
    assert waiting is not None
    assert larger is None


@pytest.mark.parametrize(
    ("setting", "gpu"),
    [
        ("train.precision=fp32", H100),
        ("seed=1", Hardware("Tesla V100-SXM2-16GB", "cuda", 16 << 30)),
        ("seed=1", Hardware("CPU", "cpu", 64 << 30)),
    ],
)
def test_nothing_is_predicted_where_nothing_was_measured(setting: str, gpu: Hardware) -> None:
    assert preview(compose_run(["+model=125m_hybrid", setting]), 1, gpu).prediction is None
