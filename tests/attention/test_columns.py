"""Where values of a kind of attention go, and the seeds of its random numbers."""

from dataclasses import replace

from s2train.attention.random_numbers import stateless_seed
from s2train.training.auxiliary_losses import column_means
from s2train.training.metrics import StepMetrics

METRICS = StepMetrics(
    step=7,
    consumed_tokens=70,
    loss=2.5,
    held_out_loss=None,
    lr=0.1,
    grad_norm=1.0,
    step_time_s=1.0,
    tokens_per_s=10.0,
    model_tflops=1.0,
    mfu=None,
    memory_gib=0.0,
    eta_s=0.0,
    auxiliary={"toy_error/1": 0.25, "toy_error/3": 0.75, "toy_error_rate/1": 0.5},
)


def test_a_column_is_the_mean_over_its_layers() -> None:
    assert column_means(METRICS.auxiliary) == {"toy_error": 0.5, "toy_error_rate": 0.5}


def test_the_log_line_has_each_column_after_the_loss() -> None:
    assert "| loss 2.5000 | toy_error 0.5000 | toy_error_rate 0.5000 | lr" in METRICS.line(100, 100)


def test_the_records_have_columns_and_layers() -> None:
    values = METRICS.values()
    assert "auxiliary" not in values
    assert (values["toy_error"], values["toy_error_by_layer"]) == (0.5, {1: 0.25, 3: 0.75})
    assert values["toy_error_rate_by_layer"] == {1: 0.5}


def test_wandb_has_a_curve_for_each_column_and_layer() -> None:
    row = METRICS.wandb_row()
    found = {name: value for name, value in row.items() if "toy" in name}
    assert found == {
        "train/toy_error": 0.5,
        "train/toy_error/layer_1": 0.25,
        "train/toy_error/layer_3": 0.75,
        "train/toy_error_rate": 0.5,
        "train/toy_error_rate/layer_1": 0.5,
    }


def test_a_seed_depends_on_each_of_its_parts_and_on_nothing_else() -> None:
    others = [
        (1235, 7, 2, 31, ""),
        (1234, 8, 2, 31, ""),
        (1234, 7, 3, 31, ""),
        (1234, 7, 2, 30, ""),
        (1234, 7, 2, 31, "a"),
    ]
    seeds = {stateless_seed(*parts) for parts in [(1234, 7, 2, 31, ""), *others, (12, 347, 2, 31, "")]}
    assert len(seeds) == 7
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_seeds_stay_what_they_were_as_runs_resume_under_later_versions() -> None:
    assert stateless_seed(1234, 7, 2, 31, "projection") == 7_692_051_520_652_878_652


def test_small_values_keep_their_digits_on_the_console() -> None:
    small = replace(METRICS, auxiliary={"toy_error/1": 0.00023, "toy_rate/1": 0.0})
    assert "| toy_error 2.3e-04 | toy_rate 0.0000 | lr" in small.line(100, 100)
