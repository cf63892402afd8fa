"""Records of a run are read the same everywhere."""

from typing import Any

from s2train.training.records import last_evaluation


def test_the_last_evaluation_is_the_last_even_if_its_loss_is_not_finite() -> None:
    records: list[dict[str, Any]] = [{"event": "config"}, {"step": 1, "loss": 3.0}]
    assert last_evaluation(records) is None
    records += [{"step": step, "held_out_loss": loss} for step, loss in ((2, 2.5), (4, None))]
    assert last_evaluation([*records, {"step": 5, "loss": None}]) == {"step": 4, "held_out_loss": None}
