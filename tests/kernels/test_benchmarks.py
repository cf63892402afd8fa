"""The benchmark on a CPU: what it measures, what it rejects, what it makes of the numbers."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from s2train.kernels import Layout, block_sparse_attention
from s2train.kernels.benchmarks import contenders, run, run_time
from s2train.kernels.benchmarks.__main__ import main
from s2train.kernels.benchmarks.cases import DEFAULT, GROUPS, Case, parse_case, parse_cases
from s2train.kernels.benchmarks.contenders import CONTENDERS, NotSupportedError, Problem, flex_block_mask
from s2train.kernels.benchmarks.correctness import full_problem, short_problem, shortened
from s2train.kernels.benchmarks.inputs import make_inputs
from s2train.kernels.benchmarks.limits import pass_flops, skip_reason
from s2train.kernels.benchmarks.plot import draw
from s2train.kernels.benchmarks.report import break_even, kernel_paths, launch_ratios, summary
from s2train.kernels.benchmarks.run_time import RUN_TIME, split_words
from s2train.kernels.benchmarks.tables import short_table
from s2train.kernels.benchmarks.timing import Clock
from s2train.kernels.token_mask import token_mask
from torch import Tensor

CPU = torch.device("cpu")
SMALL = parse_case("b16-l2-v4-128-h4-kv2-d16")


# cases
def test_a_word_says_what_is_measured() -> None:
    assert parse_case("b64-l16-v8-32k-kv8") == Case(64, 16, 8, 32768, heads=32, kv_heads=8, dim=128)
    assert parse_case("b128-l8-v16-1m-h16-d64") == Case(128, 8, 16, 2**20, heads=16, kv_heads=16, dim=64)


@pytest.mark.parametrize("word", [name for group in GROUPS.values() for name in group])
def test_names_are_words(word: str) -> None:
    assert parse_case(word).name == word


@pytest.mark.parametrize("word", ["", "b128", "b100-l8-v16-2k", "b128-l8-v16-100", "b64-l0-v1-2k", "b64-l1-v1-2k-kv5"])
def test_bad_words_are_rejected(word: str) -> None:
    with pytest.raises(ValueError, match=r"neither a group|must be|have .* tokens|at least 1"):
        parse_case(word)


def test_a_case_in_two_groups_is_measured_once() -> None:
    cases = parse_cases([*DEFAULT, "b128-l8-v16-32k"])
    assert len(cases) == len(set(cases))
    densities = [case.density() for case in cases]
    assert min(densities) < 0.03
    assert max(densities) == 1


@pytest.mark.parametrize("word", ["b16-l2-v4-128-h4-kv2-d16", "b32-l3-v1-160-h2", "b16-l1-v8-256-h4", "b64-l2-v3-64"])
def test_positions_and_layout_follow_the_mask(word: str) -> None:
    case = parse_case(word)
    position = torch.arange(case.length)
    spelled_out = torch.stack([case.keeps(h, position[:, None], position[None, :]) for h in range(case.heads)])
    assert case.kept_positions() == spelled_out.sum()
    assert torch.equal(token_mask(case.layout(CPU), case.length, case.length, causal=True), spelled_out)


# inputs
def test_formats_hold_the_same_values() -> None:
    ours, theirs = (make_inputs(SMALL, 7, format, CPU) for format in ("sbhd", "bhsd"))
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x.permute(1, 2, 0, 3), y)
    assert not torch.equal(ours[1], ours[2])
    assert not torch.equal(ours[0], make_inputs(SMALL, 8, "sbhd", CPU)[0])
    assert 0.9 < ours[0].float().std() < 1.1


# correctness
def gradients(case: Case, seed: int, scale: float = 1.0) -> tuple[Tensor, tuple[Tensor, ...]]:
    q, k, v, dout = make_inputs(case, seed, "sbhd", CPU)
    out = CONTENDERS["ours"].prepare(Problem(case, CPU))(q, k, v)
    return out, torch.autograd.grad(out * scale, (q, k, v), dout)


@pytest.mark.parametrize("word", ["b16-l2-v4-512-h4-kv2-d16", "b32-l1-v3-416-h3-d16", "b16-l2-v1-128-h2-kv1-d16"])
def test_the_sample_of_a_long_problem_is_exact(word: str) -> None:
    case = parse_case(word)
    seed = int(torch.randint(1000, ()))
    whole = short_problem(shortened(case), seed, CPU)  # so short that it is the problem itself
    part = full_problem(case, seed, whole.limits, CPU)
    for name, at in (("out", part.rows), ("dq", part.rows), ("dk", part.keys), ("dv", part.keys)):
        torch.testing.assert_close(part.results[name], whole.results[name][:, at])


def test_right_results_pass_and_wrong_ones_fail() -> None:
    seed = int(torch.randint(1000, ()))
    exact = short_problem(SMALL, seed, CPU)
    out, right = gradients(SMALL, seed)
    assert exact.wrong(exact.errors(out, right, "sbhd")) == []
    assert exact.wrong(exact.errors(out * 1.03, right, "sbhd")) == ["out"]
    _, scaled = gradients(SMALL, seed, scale=1.03)
    assert exact.wrong(exact.errors(out, scaled, "sbhd")) == ["dq", "dk", "dv"]
    assert "dk" in exact.wrong(exact.errors(out, (right[0], right[1] * torch.nan, right[2]), "sbhd"))


# contenders
def test_flex_attention_gets_the_same_blocks() -> None:
    layout = Case(128, 2, 4, 1280, heads=5, kv_heads=5).layout(CPU)
    mask = flex_block_mask(layout)
    n = layout.num_key_blocks
    assert torch.equal(mask.to_dense()[0].bool(), layout.mask())
    # masked by token are the diagonal blocks alone
    assert torch.equal(mask.kv_num_blocks[0], torch.ones(5, n, dtype=torch.int32))
    assert torch.equal(mask.kv_indices[0, :, :, 0], torch.arange(n, dtype=torch.int32).expand(5, n))


def test_flex_attention_rejects_small_blocks() -> None:
    with pytest.raises(NotSupportedError, match="blocks of 64"):
        CONTENDERS["flex"].prepare(Problem(parse_case("b64-l2-v4-128-h4"), CPU))


@pytest.mark.parametrize(
    ("name", "sparse", "format"), [("fa4_sparse", True, "bshd"), ("fa4", False, "bshd"), ("fa3", False, "bshd")]
)
def test_newer_flash_attentions_are_contenders_that_say_what_they_lack(name: str, sparse: bool, format: str) -> None:
    contender = CONTENDERS[name]
    assert (contender.sparse, contender.format) == (sparse, format)
    with pytest.raises(NotSupportedError, match=r"needs CUDA|not importable"):
        contender.prepare(Problem(parse_case("b128-l2-v4-512-h4"), CPU))


def test_flash_attention_4_has_no_sparse_backward_in_blocks_other_than_128() -> None:
    with pytest.raises(NotSupportedError, match="blocks of 64"):
        CONTENDERS["fa4_sparse"].prepare(Problem(parse_case("b64-l2-v4-512-h4"), CPU))


def fake(name: str, factor: float, monkeypatch: pytest.MonkeyPatch, *, from_length: int = 0) -> None:
    """A sparse peer that is ours times a factor, from some length on."""

    def prepare(problem: Problem) -> contenders.Attention:
        ours = CONTENDERS["ours"].prepare(problem)
        by = factor if problem.case.length >= from_length else 1.0
        return lambda q, k, v: ours(q, k, v) * by

    peer = replace(CONTENDERS["ours"], name=name, prepare=prepare)
    monkeypatch.setitem(run.CONTENDERS, name, peer)


def session(*names: str, seconds: float = 1e6) -> run.Session:
    deadline = run.time.monotonic() + seconds
    return run.Session(CPU, names, 1.0, deadline, int(torch.randint(1000, ())), run.Clock(CPU), ceiling_tflops=1e-3)


def test_a_wrong_peer_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    fake("flex", 1.05, monkeypatch)
    results = session("ours", "flex").run_case(SMALL)["results"]
    assert "ms" in results["ours"]
    assert "ms" not in results["flex"]
    assert "wrong at 128 tokens" in results["flex"]["error"]


@pytest.mark.parametrize("word", ["b128-l2-v4-2304-h1-d16"])
def test_a_peer_wrong_at_full_length_alone_gets_no_time(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("flex", 1.05, monkeypatch, from_length=2304)
    results = session("ours", "flex").run_case(parse_case(word))["results"]
    assert "ms" in results["ours"]
    assert "wrong at 2304 tokens" in results["flex"]["error"]


def test_one_failing_contender_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(problem: Problem) -> contenders.Attention:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setitem(run.CONTENDERS, "flex", replace(CONTENDERS["flex"], prepare=explode))
    results = session("flex", "dkernel", "cudnn", "ours").run_case(SMALL)["results"]
    assert results["flex"]["error"] == "out of memory"
    assert results["dkernel"]["error"].startswith("not supported: not importable")
    assert results["cudnn"]["error"] == "not supported: needs CUDA"
    assert results["ours"]["ms"]["both"] > 0


def test_nothing_begins_after_the_deadline() -> None:
    assert session("ours", seconds=-1).run_case(SMALL)["results"]["ours"] == {"error": "not run: out of time"}


# what is not begun
def test_what_surely_takes_too_long_is_rejected_with_a_reason() -> None:
    case = parse_case("b128-l8-v16-512k")
    dense, ours = CONTENDERS["flash2"], CONTENDERS["ours"]
    mask = parse_case("b128-l1-v1-512k")  # of contenders that ignore masks
    flops = 3.5 * 4 * 128 * 32 * (case.length * (case.length + 1) // 2)
    assert pass_flops(mask) == pytest.approx(flops)
    # 800 TFLOP/s: four dense passes need 39 s at least, the sparse ones a fifteenth
    why = skip_reason(dense, case, mask, None, 800, 20)
    assert why is not None
    assert f"4 passes would take {4 * flops / 8e14:.0f} s" in why
    assert skip_reason(dense, case, mask, None, 800, 40) is None
    assert skip_reason(ours, case, case, None, 800, 20) is None
    assert skip_reason(CONTENDERS["dkernel"], case, case, None, 800, 20) is not None  # its own tuning


@pytest.mark.parametrize(
    ("word", "contender", "fits"),
    [
        ("b128-l8-v16-512k", "ours", True),
        ("b128-l8-v16-1m-kv8", "ours", True),
        ("b128-l8-v16-1m", "ours", False),  # q, k, v, dout are 34 GB, out, dq, dk, dv and the sums 51
        ("b128-l8-v16-1m-kv8", "flex", False),
    ],
)
def test_what_does_not_fit_80_gb_is_rejected_with_a_reason(word: str, contender: str, fits: bool) -> None:
    case = parse_case(word)
    why = skip_reason(CONTENDERS[contender], case, case, 85_017_493_504, 800, 1e9)
    assert why is None if fits else why is not None and "the device has 85" in why


def test_a_rejected_contender_is_a_line_of_the_record() -> None:
    slow = run.Session(CPU, ("ours",), 1.0, run.time.monotonic() + 1e6, 1, run.Clock(CPU), 1e-3, limit_seconds=1e-9)
    result = slow.run_case(SMALL)["results"]["ours"]
    assert result["error"].startswith("not run: its 4 passes would take")


MEASURED = json.loads((Path(contenders.__file__).parents[1] / "results/2026-11-22-h100-benchmarks.json").read_text())


@pytest.mark.parametrize(("name", "above"), [("ours", 1.1), ("cudnn", 1.05), ("flash2", 1.05), ("flex", 1.15)])
def test_estimated_memory_covers_the_measured_peak(name: str, above: float) -> None:
    """FlexAttention's sorting of indices is over before the peak is measured."""
    for record in MEASURED["cases"]:
        case = parse_case(record["case"])
        measured = record["results"][name].get("peak_bytes")
        if measured and case.length >= 32768:  # below, what does not grow with the length counts
            assert 0.99 * measured <= CONTENDERS[name].bytes_needed(case) <= above * measured, record["case"]


# numbers
def test_break_even_lies_between_measured_points() -> None:
    assert break_even([(2048, 0.5), (8192, 2.0)]) == {"at": pytest.approx(4096), "bound": "measured"}
    assert break_even([(2048, 1.5), (8192, 0.9), (16384, 0.5)])["at"] is None
    assert break_even([(2048, 1.5), (8192, 3)]) == {"at": 2048, "bound": "end"}
    # a dip counts: faster from there on
    assert break_even([(1, 2.0), (2, 0.5), (8, 2.0)])["at"] == pytest.approx(4)


def made_up(words: list[str], **ms: float) -> list[dict[str, Any]]:
    """Records with times of 4 ms a density for sparse contenders, and a constant for dense ones."""
    records = []
    for case in parse_cases(words):
        results = {}
        for name, factor in ms.items():
            both = factor * case.length * (case.density() if CONTENDERS[name].sparse else 1)
            results[name] = {"ms": {"forward": both / 3, "backward": both * 2 / 3, "both": both}}
        sizes = {f: getattr(case, f) for f in ("block", "local", "stride", "length", "heads", "kv_heads", "dim")}
        records.append({"case": case.name} | sizes | {"density": case.density(), "results": results})
    return records


def test_summary_finds_break_even_density_and_best_peer() -> None:
    found = summary(made_up([*GROUPS["density"], "b128-l8-v1-32k"], ours=2.0, cudnn=1.0, flex=3.0, dkernel=2.6))
    at = found["break_even_density"]["b128 32768 tokens 32/32 d128"]["both"]["at"]
    assert at == pytest.approx(0.5, rel=0.01)
    part = found["ratios"]["b128-l8-v4-32k"]["backward"]
    assert part["best_peer"] == ("dkernel", pytest.approx(1.3))
    others = made_up(["b128-l8-v4-32k"], ours=2.0, cudnn=1.0, flash2=1.9, fa4=0.9)
    dense = summary(others)["ratios"]["b128-l8-v4-32k"]["both"]["best_dense"]
    assert dense == ("fa4", pytest.approx(0.9 / 2.0 / others[0]["density"]))


def launched(word: str, eager: float, graph: float | None) -> dict[str, Any]:
    """A launch record in which FlashAttention-2 takes so many times ours."""
    ours = {"host_us": 9.0, "eager_ms": 0.4, "device_ms": 0.2, "graph_ms": 0.2}
    theirs = {"host_us": 9.0, "eager_ms": 0.4 * eager, "device_ms": 0.3, "graph_ms": graph and 0.2 * graph}
    results = {"ours": {"forward": ours, "both": ours}, "flash2": {"forward": theirs, "both": theirs}}
    return {"case": word, "results": results | {"dkernel": {"error": "not supported"}}}


def test_calls_slower_than_a_peers_are_named() -> None:
    records = [launched("b128-l8-v16-4k", eager=0.9, graph=2.0), launched("b128-l8-v16-2k", eager=1.5, graph=None)]
    assert launch_ratios(records[0], "eager_ms") == {"flash2": (pytest.approx(0.9), pytest.approx(0.9))}
    assert launch_ratios(records[1], "graph_ms") == {}  # its capture failed
    assert str(short_table(records).caption).splitlines() == [
        f"b128-l8-v16-4k, eager, {part}: dense, FlashAttention-2 is faster"
        for part in ("forward", "forward and backward")
    ]


def test_the_kernels_that_ran_are_recognized_by_their_names() -> None:
    ours = [record["results"]["ours"] for record in MEASURED["cases"]]
    assert {kernel_paths(result) for result in ours if "ms" in result} == {"hopper / hopper"}
    assert (
        kernel_paths({"kernels": ["s2_attention_fwd_kernel_hopper", "s2_attention_bwd_kernel_dq"]}) == "hopper / triton"
    )
    assert kernel_paths({"kernels": []}) == "torch / torch"


def test_the_plot_is_drawn_from_what_was_saved(tmp_path: Path) -> None:
    cases = made_up([*GROUPS["lengths"], *GROUPS["density"]], ours=1.0, cudnn=0.9, flex=1.4, flash2=1.9)
    (tmp_path / "a.json").write_text(json.dumps({"machine": {"device": "made up"}, "cases": cases}))
    data = json.loads((tmp_path / "a.json").read_text())
    draw(data, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    data["launches"] = [launched(word, eager=0.5, graph=2.0) for word in GROUPS["lengths"][1:4]]
    draw(data, tmp_path / "c.png")
    assert len((tmp_path / "c.png").read_bytes()) > 1.02 * len((tmp_path / "a.png").read_bytes())  # one panel more
    with pytest.raises(ValueError, match="no case like"):
        draw(data, tmp_path / "b.png", "b64-l1-v1-2k")


# the program
def test_a_run_cut_short_leaves_every_finished_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, begun = tmp_path / "found.json", []

    def cut(session: run.Session, case: Case, progress: Any) -> dict[str, Any]:
        begun.append(case)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return whole(session, case, progress)

    whole = run.Session.run_case
    monkeypatch.setattr(run.Session, "run_case", cut)
    words = ["b16-l2-v4-64-h4-d16", SMALL.name, "b16-l2-v4-96-h4-d16"]
    with pytest.raises(KeyboardInterrupt):
        main(
            ["--device", "cpu", "--output", str(output), "--contenders", "ours", "--budget-ms", "1", "--cases", *words]
        )
    data = json.loads(output.read_text())
    assert [record["case"] for record in data["cases"]] == words[:2]
    assert set(data["summary"]) == {"ratios", "break_even_length", "break_even_density"}
    assert data["cases"][0]["results"]["ours"]["of_ceiling"]["both"] > 0


def test_the_program_writes_dated_numbers_and_never_over_others(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "found.json"
    words = ["--device", "cpu", "--output", str(output), "--contenders", "ours", "--budget-ms", "1"]
    words += ["--cases", SMALL.name, "b16-l2-v4-64-h4-kv2-d16", "--launches", SMALL.name, "--draw", SMALL.name]
    assert main(words) == 0
    data = json.loads(output.read_text())
    assert data["date"].startswith("20")
    assert data["command"].endswith(" ".join(words[-2:]))
    assert data["machine"]["torch"] == torch.__version__
    assert data["ceiling_tflops"] > 0
    first = data["cases"][0]
    assert first["case"] == SMALL.name
    ours = first["results"]["ours"]
    flops = 4 * 16 * SMALL.kept_positions()
    assert ours["tflops"]["backward"] == pytest.approx(2.5 * flops / ours["ms"]["backward"] / 1e9)
    assert data["launches"][0]["results"]["ours"]["forward"]["host_us"] > 0
    assert output.with_suffix(".png").exists()
    with pytest.raises(SystemExit):
        main(words)


# layouts made at run time
RUN_TIME_WORD = "b16-k4-128-h4-kv2-d16"


def test_words_of_run_time_layouts_are_separated_from_the_others() -> None:
    cases, others = split_words(["b128-l8-v16-32k-kv8", RUN_TIME_WORD, "targets", "run-time", RUN_TIME_WORD])
    assert [case.name for case in cases] == [RUN_TIME_WORD, *RUN_TIME]
    assert others == ["b128-l8-v16-32k-kv8", "targets"]


@pytest.mark.parametrize("word", ["b16-k2-128", "b16-k9-128", "b48-k4-96", "b16-k4-100", "b16-k4-128-h3-kv2"])
def test_run_time_layouts_that_can_not_be_made_are_rejected(word: str) -> None:
    with pytest.raises(ValueError, match=word):
        split_words([word])


def test_run_time_lists_name_own_previous_and_first_block_and_none_later() -> None:
    ((case,), _) = split_words([RUN_TIME_WORD])
    indices = case.indices(torch.device("cpu"))
    assert indices.shape == (1, 2, 8, 4)
    for row, named in enumerate(indices[0, 0].tolist()):
        found = [block for block in named if block >= 0]
        assert {row, max(row - 1, 0), 0} <= set(found) <= set(range(row + 1))
        assert len(set(found)) == len(found) == min(row + 1, 4)


def test_run_time_layouts_are_timed_beside_the_static_one(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    words = ["--device", "cpu", "--output", str(output), "--contenders", "ours", "--budget-ms", "1", "--launches"]
    assert main([*words, "--cases", RUN_TIME_WORD]) == 0
    (record,) = json.loads(output.read_text())["run_time"]
    assert record["kernels"] == ["torch", "torch"]
    times = [record["results"][way]["ms"]["both"] for way in ("static", "built")]
    assert record["over_static"]["built"]["both"] == pytest.approx(times[1] / times[0])
    assert record["build"]["host_us"] > 0


@pytest.mark.parametrize(("call", "factor"), [(2, 1.1), (3, 1.1), (3, math.nan)])
def test_run_time_layouts_with_other_results_get_no_time(
    call: int, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count(1)

    def other(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> torch.Tensor:
        out = block_sparse_attention(q, k, v, layout)
        return out * factor if next(calls) == call else out

    monkeypatch.setattr(run_time, "block_sparse_attention", other)
    ((case,), _) = split_words([RUN_TIME_WORD])
    record = run_time.measure(case, Clock(torch.device("cpu")), torch.device("cpu"), 1)
    assert record["error"].startswith("differs")
    assert record["results"] == {}
