"""Dense layers run the fastest measured kernels that serve a call, and say why not faster ones."""

import json
from itertools import groupby, pairwise
from pathlib import Path

import pytest
import torch
from s2train.kernels import dense_choice
from s2train.kernels.dense_choice import (
    LONG,
    LONGEST,
    ORDER_FILE,
    DenseCall,
    Kind,
    choose_dense,
    dense_order,
    takes_fa4,
)
from s2train.kernels.verified import VERIFIED, Verified, verified

RESULTS = Path(dense_choice.__file__).parent / "results"
HOPPER = (9, 0)
RELEASE = next(entry.release for entry in VERIFIED if entry.library == "flash-attn-4")


def call(kind: Kind = "whole", dim: int = 128, dtype: torch.dtype = torch.bfloat16, length: int = 32768) -> DenseCall:
    return DenseCall(kind, dtype, dim, grouped=True, deterministic=False, capability=HOPPER, length=length)


def serves_all(_: str) -> None:
    return None


@pytest.fixture
def fa4(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """FlashAttention-4 in the verified release."""
    monkeypatch.setattr(dense_choice, "installed_version", lambda _: RELEASE)
    monkeypatch.setattr(dense_choice, "fa4_problem", lambda: None)
    return monkeypatch


@pytest.fixture
def no_fa4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_choice, "installed_version", lambda _: None)


@pytest.mark.usefixtures("fa4")
@pytest.mark.parametrize("kind", ["whole", "later", "documents"])
def test_a_verified_flash_attention_4_is_taken_for_every_sort_of_call(kind: Kind) -> None:
    choice = choose_dense(call(kind), "auto", serves_all)
    assert (choice.implementation, choice.passed) == ("fa4", ())
    assert str(choice).endswith(": fa4 (the fastest measured)")


@pytest.mark.usefixtures("no_fa4")
def test_without_it_our_own_kernels_come_before_cudnn() -> None:
    choice = choose_dense(call(), "auto", serves_all)
    assert str(choice) == ("whole sequences: s2train, every block kept (not fa4: flash-attn-4 is not installed)")


@pytest.mark.usefixtures("no_fa4")
def test_cudnn_is_taken_for_sequences_of_other_lengths_than_ours_was_faster_at() -> None:
    assert choose_dense(call(length=LONG - 1), "auto", serves_all).implementation == "cudnn"
    assert choose_dense(call(length=LONGEST + 1), "auto", serves_all).implementation == "cudnn"


@pytest.mark.usefixtures("no_fa4")
def test_kernels_that_do_not_serve_a_call_are_passed_over_with_the_reason() -> None:
    choice = choose_dense(call(), "auto", lambda name: None if name == "flash" else f"{name} can't")
    assert choice.implementation == "flash"
    assert [name for name, _ in choice.passed] == ["fa4", "s2train", "cudnn"]
    assert "not cudnn: cudnn can't" in str(choice)
    with pytest.raises(ValueError, match=r"no dense attention for whole bfloat16 d128 grouped: fa4: .*; efficient: no"):
        choose_dense(call(), "auto", lambda _: "no")


def test_another_release_or_gpu_is_not_taken_unless_asked_for(fa4: pytest.MonkeyPatch) -> None:
    fa4.setattr(dense_choice, "installed_version", lambda _: "4.0.0b37")
    choice = choose_dense(call(), "auto", serves_all)
    assert choice.implementation == "s2train"
    assert "flash-attn-4 4.0.0b37 was not checked for whole bfloat16 d128 grouped" in str(choice)
    assert str(choose_dense(call(), "fa4", serves_all)) == "whole sequences: fa4 (as asked)"


def test_an_import_that_fails_is_a_reason(fa4: pytest.MonkeyPatch) -> None:
    fa4.setattr(dense_choice, "fa4_problem", lambda: "flash-attn-4 can't be imported (no libcuda)")
    assert "no libcuda" in str(choose_dense(call(), "auto", serves_all))
    with pytest.raises(ValueError, match=r"dense_attention=fa4 can't run .*no libcuda.*set dense_attention=auto"):
        choose_dense(call(), "fa4", serves_all)


@pytest.mark.usefixtures("fa4")
@pytest.mark.parametrize(
    ("asked", "wrong", "why"),
    [
        ("cudnn", call("later"), "no later queries"),
        ("flash", call("documents"), "no packed documents"),
        ("fa4", call(dtype=torch.float32), "float32 is neither"),
        ("fa4", call(dim=100), "not a multiple of 8"),
    ],
)
def test_kernels_asked_for_by_name_are_rejected_where_they_do_not_serve(asked: str, wrong: DenseCall, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        choose_dense(wrong, asked, serves_all)


@pytest.mark.usefixtures("fa4")
def test_a_model_that_flash_attention_4_serves_is_known_before_a_call() -> None:
    asked = {"grouped": True, "deterministic": False}
    assert takes_fa4(HOPPER, torch.bfloat16, 128, **asked)
    assert not takes_fa4((10, 0), torch.bfloat16, 128, **asked)  # it has kernels, which nobody checked
    assert not takes_fa4(HOPPER, torch.float32, 128, **asked)


def measured_groups() -> list[list[dict]]:
    """Timings of the same call by several implementations."""
    times = json.loads((RESULTS / ORDER_FILE).read_text())["times"]

    def sort(row: dict) -> tuple:
        return row["case"].partition(": ")[2], row["length"], row["heads"]

    return [list(rows) for _, rows in groupby(times, key=sort)]


@pytest.mark.parametrize("rows", measured_groups(), ids=lambda rows: f"{rows[0]['case']} {rows[0]['length']}")
def test_the_order_is_the_measured_one_up_to_the_spread(rows: list[dict]) -> None:
    kind = rows[0]["case"].partition(": ")[2].split()[0]
    order = dense_order(kind, rows[0]["length"])
    ranked = sorted(rows, key=lambda row: order.index(row["case"].partition(":")[0]))
    for faster, slower in pairwise(ranked):
        assert faster["ms"]["both"] <= slower["ms"]["both"] * (1 + max(faster["spread"], slower["spread"]))


# what may be taken at all
def right_cases(entry: Verified) -> set[str]:
    """Those that an entry's file calls right, if it is of that library's release and GPU."""
    folders = (RESULTS, RESULTS.parents[1] / "launch" / "results")
    data = json.loads(next(path for folder in folders if (path := folder / entry.file).exists()).read_text())
    versions = data.get("versions", data)
    assert versions[entry.library] == entry.release
    assert any(name in data["device"] for name in ("H100", "H200"))  # of one compute capability
    if entry.library == "flash-attn-4":
        rows = [row for row in data["checks"] if row["ok"]]
        return {row["case"].removeprefix("fa4: ") for row in rows if row["case"].startswith("fa4: ")}
    precisions = {"bfloat16": "bf16", "float32": "fp32"}
    rows = [row for row in data["checks"] if row["way"] == ("s2train" if entry.library == "triton" else "liger")]
    return {f"{row['operation']} {precisions[row['dtype']]}" for row in rows if row["ok"]}


@pytest.mark.parametrize("entry", VERIFIED, ids=lambda entry: f"{entry.library} {entry.file}")
def test_every_case_called_verified_was_found_right_in_its_file(entry: Verified) -> None:
    assert entry.cases
    assert entry.cases <= right_cases(entry)


def test_only_the_checked_release_gpu_and_case_are_verified() -> None:
    case = "whole bfloat16 d128"
    assert verified("flash-attn-4", RELEASE, HOPPER, case) == ORDER_FILE
    assert verified("flash-attn-4", RELEASE, (8, 0), case) is None
    assert verified("flash-attn-4", "3.0", HOPPER, case) is None
    assert verified("flash-attn-4", RELEASE, HOPPER, "whole bfloat16 d96") is None
