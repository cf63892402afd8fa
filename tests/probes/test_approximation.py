"""What HyperAttention changes in a trained model: norms, errors, and the grid of replaced layers."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from s2train.kernels.hyper import HyperSettings

from s2train.checkpoints.folders import write_config
from s2train.errors import ConfigError
from s2train.planning import compose_run
from s2train.probes.approximation import evaluate_checkpoint
from s2train.probes.approximation.column_norms import LEFT_OUT, Columns, columns, squared_column_norms
from s2train.probes.approximation.errors import errors, synthetic
from s2train.probes.approximation.evaluate_checkpoint import Source, norm_table, replace_layers
from s2train.probes.approximation.held_out import held_out_sequences
from s2train.probes.approximation.replacement import Cell, Grid, check_grid, perplexities, read_cells, write_cells
from tests.program import error_line, metrics, pretrain, run

SETTINGS = ["bucket=16", "shortest=32", "window=16", "sinks=16", "projections=6"]


def test_column_norms_of_several_lengths_are_those_of_the_whole_matrices() -> None:
    query, key = torch.randn(301, 2, 4, 8), torch.randn(301, 2, 2, 8)
    found = squared_column_norms(query, key, 0.5, [37, 256, 301])
    for norms, n in zip(found, (37, 256, 301), strict=True):
        scores = torch.einsum("qbhd,kbhd->bhqk", query[:n], key[:n].repeat_interleave(2, 2)).double() * 0.5
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
        assert torch.allclose(norms.double(), scores.softmax(-1).square().sum(-2), rtol=1e-4)


def test_the_heaviest_columns_are_left_out_of_the_rest() -> None:
    norms = torch.arange(100.0).expand(1, 2, 100)
    assert columns(3, 100, norms).mean == 99
    assert columns(3, 100, norms).mean_of_rest == 99 - LEFT_OUT


def test_published_norms_are_listed_where_a_length_has_one() -> None:
    norms = [Columns(0, length, 2.0, 3.0, 0.5) for length in (256, 2000)]
    assert norm_table(norms[:1], [256]).row_count == 1
    both = norm_table(norms, [256, 2000])
    assert [list(column.cells) for column in both.columns][2] == ["2.0000 (0.5000)", "0.0638"]


def test_errors_vanish_where_all_keys_are_sampled_and_clusters_are_found() -> None:
    settings = HyperSettings(16, 1, 12, 32, 0, 0)
    gaussian, clustered = synthetic(256, 2, 32, seed=int(torch.randint(1 << 30, ())))
    for inputs in (gaussian, clustered):
        few, all_ = errors(inputs, settings, [4, 128], draws=1)
        assert few.relative > 0.05
        assert all_.relative < 1e-5


@pytest.mark.parametrize(
    ("grid", "settings", "telling"),
    [
        (Grid((5,), (8,), 1), {}, "--last=5: the model has 4 layers"),
        (Grid((1,), (8,), 0), {}, "--draws=0"),
        (Grid((1,), (8, 999), 1), {}, "--samples=999: the longest interval of --length=256 tokens has 128"),
        (Grid((1,), (8,), 1), {"shortest": 256}, "shortest=256: a sequence of --length=256 tokens is one interval"),
        (Grid((1,), (8,), 1), {"window": 128}, r"window=128: .* from 0 to 64 \(shortest\)"),
        (Grid((1,), (8,), 1), {"buckets": 128}, "buckets=128: .* Did you mean bucket?"),
        (Grid((1,), (8,), 1), {"samples": 8}, "samples=8: --samples has its values"),
    ],
)
def test_a_grid_that_can_not_be_measured_is_rejected_by_the_names_of_the_command_line(
    grid: Grid, settings: dict[str, int], telling: str
) -> None:
    cfg = compose_run(["+model=tiny_dense"])
    with pytest.raises(ConfigError, match=f"^{telling}"):
        check_grid(grid, cfg, {"bucket": 16, "shortest": 64, "window": 16, "sinks": 16} | settings, 256)


def test_data_that_are_missing_are_named_by_their_option() -> None:
    with pytest.raises(ConfigError, match=r"^--data=no/such: no/such\.idx is missing"):
        held_out_sequences(compose_run(["+model=tiny_dense"]).data, "no/such", 64, 2)


def test_cells_of_another_question_are_not_mixed(tmp_path: Path) -> None:
    cells, path = [Cell(0, 0, 0, 2.0), Cell(1, 8, 0, 2.5), Cell(1, 8, 1, 2.7)], tmp_path / "grid.json"
    write_cells(path, {"length": 256}, cells, {"command": "mine"})
    assert read_cells(path, {"length": 256}) == cells
    assert perplexities(cells, 1) == {8: pytest.approx(13.4637, rel=1e-4)}
    with pytest.raises(ConfigError, match="another length"):
        read_cells(path, {"length": 512})
    assert asdict(cells[0])["loss"] == 2.0


def test_a_file_without_cells_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "grid.json").write_text('{"length": 256}')
    with pytest.raises(
        ConfigError, match=r"^--output=.*grid.json: holds no results of this program \(KeyError: 'cells'"
    ):
        read_cells(tmp_path / "grid.json", {"length": 256})


def test_a_file_of_another_question_is_rejected_before_a_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "checkpoints" / "iter_0000001"
    checkpoint.mkdir(parents=True)
    write_config(compose_run(["+model=tiny_dense"]), checkpoint / "config.yaml")  # there are no weights to load
    for name, value in (("weights_fingerprint", "mine"), ("held_out_sequences", torch.zeros(2, 257))):
        monkeypatch.setattr(evaluate_checkpoint, name, lambda *_, value=value: value)
    write_cells(tmp_path / "grid.json", {"length": 512}, [], {})
    settings = {"bucket": 16, "shortest": 64, "window": 16, "sinks": 16}
    with pytest.raises(ConfigError, match=r"another .*length"):
        replace_layers(Source(str(tmp_path), None, 256, 2), Grid((1,), (8,), 1), settings, tmp_path / "grid")


@pytest.mark.slow
def test_layers_of_a_trained_model_are_replaced_and_a_rerun_adds_what_is_missing(tmp_path: Path) -> None:
    pretrain(tmp_path / "run", "layout.layers=D", "train.steps=4", "evaluation.interval=4").succeeded()
    command = ["replace_layers.py", str(tmp_path / "run"), *SETTINGS, "--length", "128", "--sequences", "2"]
    command += ["--output", str(tmp_path / "grid"), "--samples"]
    first = run(*command, "64", "--last", "4", processes=0).succeeded()
    assert f"results in {tmp_path / 'grid'}.json" in first.out
    second = run(*command, "4", "64", "--last", "4", processes=0, pictures=True).succeeded()
    assert "no layer replaced" not in second.out
    unchanged, exact, sampled = (cell.loss for cell in read_cells(tmp_path / "grid.json", {}))
    assert exact == pytest.approx(unchanged, rel=1e-6)
    assert sampled != pytest.approx(unchanged, rel=1e-6)
    assert metrics(tmp_path / "run")[-1]["held_out_loss"] == pytest.approx(unchanged, rel=0.2)
    assert (tmp_path / "grid.png").stat().st_size > 1000
    rejected = run(*command, "4", "--last", "1", "--length", "64", processes=0)
    assert "measured with another length" in error_line(rejected)
