"""A step equals Megatron's own bit for bit, and does nothing twice."""

from typing import Any

import pytest

from tests.program import results_of

CASES = [f"{optimizer}, {precision}" for optimizer in ("distributed", "plain") for precision in ("bf16", "fp32")]


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = results_of("tests.megatron.optimizer_views_program", processes=2)
    return found


@pytest.mark.parametrize("case", CASES)
def test_steps_equal_those_of_megatron_bit_for_bit(case: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank[case]
        megatron, ours = found["norms"]
        assert min(ours) < found["limit"] < max(ours)  # some were clipped
        assert ours == megatron
        assert found["same weights"]
        assert found["same masters"]
        assert found["dtype"] == ("torch.bfloat16" if case.endswith("bf16") else "torch.float32")


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_prepared_once_in_a_step(case: str, ranks: list[dict[str, Any]]) -> None:
    assert [rank[case]["prepared"] for rank in ranks] == [1, 1]


@pytest.mark.parametrize("case", CASES[:2])
def test_a_gradient_keeps_its_view_while_its_memory_stays(case: str, ranks: list[dict[str, Any]]) -> None:
    assert all(rank[case]["kept views"] for rank in ranks)
