"""The benchmark of block statistics checks what it times."""

import pytest
import torch
from s2train.kernels.benchmarks import block_statistics as benchmark
from s2train.kernels.benchmarks.timing import Clock

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "HEADS", 4)
    monkeypatch.setattr(benchmark, "KV_HEADS", 2)
    monkeypatch.setattr(benchmark, "DIM", 64)


@pytest.mark.parametrize("statistic", benchmark.STATISTICS)
def test_a_right_result_passes_and_a_wrong_one_does_not(statistic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = benchmark.Case(statistic, 300)
    assert benchmark.measure(case, CPU, Clock(CPU))["ok"]
    run = benchmark.Inputs.run
    monkeypatch.setattr(benchmark.Inputs, "run", lambda inputs, name: 1.01 * run(inputs, name))
    assert not benchmark.measure(case, CPU, Clock(CPU))["ok"]


def test_flops_are_those_of_the_products_over_visible_pairs() -> None:
    assert benchmark.Case.parse("mass-1k").flops == 2 * 64 * 4 * (1024 * 1025 / 2)
    assert benchmark.Case.parse("effects-1k").flops == 2 * benchmark.Case.parse("mass-1k").flops
    blocks = sum(min(row + 1, 16) for row in range(32))
    assert benchmark.Case.parse("listed-4k").flops == 2 * 64 * 4 * blocks * 128**2


@pytest.mark.parametrize("word", ["mass", "mass-0", "mean-32k", "mass-32m"])
def test_a_word_that_names_no_case_is_rejected(word: str) -> None:
    with pytest.raises(ValueError, match="no case"):
        benchmark.Case.parse(word)
