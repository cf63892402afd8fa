"""An evaluation writes results, and resumes from them."""

import io
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from s2train.attention.reachability import reach
from s2train.config import ModelConfig, PretrainConfig
from s2train.data.tokenizers import ByteTokenizer
from s2train.environment.provenance import environment
from s2train.inference.generation import Decode
from s2train.needles.config import NeedleConfig
from s2train.needles.evaluation import run_needles
from s2train.needles.heat_map import draw_heat_map, score_table
from s2train.needles.reach import NeedleReach
from s2train.needles.results import (
    Cell,
    CellReach,
    NeedleResults,
    layout_fingerprint,
    load_results,
    output_folder,
    results_from,
    weights_fingerprint,
)
from s2train.needles.retrieval import NeedleGrid
from s2train.needles.samples import TaskSampler
from s2train.needles.scores import Score
from tests.inference.uncached import LanguageModel, greedy_decode
from tests.layouts.layout_cases import make_hybrid, mask_of
from tests.needles.fake_models import copier, parrot
from tests.program import ROOT

GRID = NeedleGrid(lengths=(128, 160), depths=(0.0, 1.0), trials=2, seed=3)


def run(
    model: LanguageModel,
    folder: Path,
    grid: NeedleGrid = GRID,
    settings: dict[str, Any] | None = None,
    step: int = 100,
) -> NeedleResults:
    return run_decoder(partial(greedy_decode, model), folder, grid, settings, step)


def run_decoder(
    decode: Decode, folder: Path, grid: NeedleGrid = GRID, settings: dict[str, Any] | None = None, step: int = 100
) -> NeedleResults:
    asked = NeedleResults(
        "runs/x", step, settings or {"trials": 2}, list(grid.lengths), list(grid.depths),
        command=shlex.join(sys.argv), environment=environment(),
    )  # fmt: skip
    sampler = TaskSampler(ByteTokenizer())
    return run_needles(decode, sampler, grid, asked, folder, batch_size=8, device=torch.device("cpu"))


class CountingCopier:
    """Decodes like the copier; raises KeyboardInterrupt at call number `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        self.calls, self.stop = 0, stop

    def __call__(self, prompts: Tensor, new_tokens: int) -> Tensor:
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        return greedy_decode(copier, prompts, new_tokens)


def test_the_json_holds_checkpoint_settings_score_and_every_cell(tmp_path: Path) -> None:
    run(copier, tmp_path)
    content = json.loads((tmp_path / "needle.json").read_text())
    assert (content["checkpoint"], content["step"], content["total"]["score"]) == ("runs/x", 100, 1.0)
    assert content["settings"] == {"trials": 2}
    assert content["cells"][0] | {"seconds": None} == {
        "length": 128,
        "depth": 0.0,
        "correct": 2,
        "trials": 2,
        "token_accuracy": 1.0,
        "character_accuracy": 1.0,
        "reach": None,
        "seconds": None,
        "values_found": 2,
        "values": 2,
        "score": 1.0,
        "interval": [pytest.approx(0.342, abs=1e-3), 1.0],
    }
    assert [(cell["length"], cell["depth"]) for cell in content["cells"]] == GRID.cells


def test_the_json_holds_command_device_date_versions_and_the_seconds_of_every_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["launch/needle.py", "task=[single, multi]"])

    def decode(prompts: Tensor, new_tokens: int) -> Tensor:
        time.sleep(0.05)
        return greedy_decode(copier, prompts, new_tokens)

    run_decoder(decode, tmp_path)
    content = json.loads((tmp_path / "needle.json").read_text())
    assert shlex.split(content["command"]) == sys.argv
    assert {"date", "device", "python", "torch", "megatron-core", "s2train"} <= content["environment"].keys()
    assert content["environment"]["torch"] == torch.__version__
    assert all(0.05 <= cell["seconds"] < 60 for cell in content["cells"])


def test_cells_of_another_command_and_machine_are_reused(tmp_path: Path) -> None:
    run(copier, tmp_path)
    content = json.loads((tmp_path / "needle.json").read_text())
    content |= {"command": "another", "environment": {"device": "another"}}
    for cell in content["cells"]:
        cell["seconds"] = 7.5
    (tmp_path / "needle.json").write_text(json.dumps(content))
    model = CountingCopier()
    run_decoder(model, tmp_path)
    assert model.calls == 0
    # Nothing was evaluated here, so the file still names the command and machine of the cells.
    assert json.loads((tmp_path / "needle.json").read_text()) == content


def test_the_json_names_the_command_of_new_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command, depths in (("first", (0.0,)), ("second", (0.0, 1.0))):
        monkeypatch.setattr(sys, "argv", [command])
        found = run(copier, tmp_path, replace(GRID, depths=depths))
        assert found.command == command


def test_results_without_command_environment_and_seconds_are_resumed(tmp_path: Path) -> None:
    run(copier, tmp_path)
    content = json.loads((tmp_path / "needle.json").read_text())
    del content["command"], content["environment"]
    for cell in content["cells"]:
        del cell["seconds"]
    (tmp_path / "needle.json").write_text(json.dumps(content))
    model = CountingCopier()
    found = run_decoder(model, tmp_path)
    assert (model.calls, found.command, found.environment) == (0, None, None)
    assert [cell.seconds for cell in found.cells] == [None] * 4


@pytest.mark.parametrize(
    "path", sorted((ROOT / "launch" / "results").glob("*needle*.json")), ids=lambda path: path.stem
)
def test_committed_results_can_be_read(path: Path) -> None:
    content = json.loads(path.read_text())
    grids = [variant["grid"] for variant in content["variants"].values()] if "variants" in content else [content]
    assert all(results_from(grid).score for grid in grids if grid)


@pytest.mark.parametrize("missing", ["checkpoint", "settings", "cells"])
def test_a_file_without_a_required_field_is_not_read_as_results(missing: str, tmp_path: Path) -> None:
    run(copier, tmp_path)
    content = json.loads((tmp_path / "needle.json").read_text())
    del content[missing]
    (tmp_path / "needle.json").write_text(json.dumps(content))
    assert load_results(tmp_path / "needle.json") is None


def test_an_interrupted_evaluation_resumes_from_its_finished_cells(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_decoder(CountingCopier(stop=4), tmp_path)
    kept = load_results(tmp_path / "needle.json")
    assert kept is not None
    assert len(kept.cells) == 3
    again = CountingCopier()
    assert run_decoder(again, tmp_path).score == Score(8, 8)
    assert again.calls == 1


def test_an_evaluation_killed_at_any_time_leaves_a_valid_file(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from s2train.needles.results import Cell, NeedleResults\n"
        "results = NeedleResults('runs/x', 1, {}, list(range(1, 60)), [0.0])\n"
        "while True:\n"
        "    for length in range(1, 60):\n"
        "        results.add(Cell(length, 0.0, 1, 2, 0.5, 0.5)); results.save(Path('needle.json'))\n"
        "        print('saved', flush=True)\n"
    )
    for saves in np.random.default_rng().integers(1, 60, size=3).tolist():
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert process.stdout is not None
        for _ in range(saves):
            process.stdout.readline()
        process.kill()
        process.wait()
        process.stdout.close()
        kept = load_results(tmp_path / "needle.json")
        assert kept is not None
        assert len(kept.cells) >= min(saves, 59)


def test_a_larger_grid_evaluates_only_new_cells_and_scores_all(tmp_path: Path) -> None:
    run(parrot, tmp_path)
    model = CountingCopier()
    wider = NeedleGrid(lengths=(128, 160), depths=(0.0, 0.5, 1.0), trials=2, seed=3)
    assert run_decoder(model, tmp_path, wider).score == Score(4, 12)
    assert model.calls == 2


def test_a_smaller_grid_scores_only_its_cells_and_keeps_the_rest(tmp_path: Path) -> None:
    run(copier, tmp_path, NeedleGrid((128,), (0.0,), 2, 3))
    run(parrot, tmp_path, NeedleGrid((160,), (0.0,), 2, 3))
    content = json.loads((tmp_path / "needle.json").read_text())
    assert content["total"]["score"] == 0
    assert [cell["correct"] for cell in content["cells"]] == [2, 0]


def test_results_of_other_settings_are_renamed_and_not_resumed(tmp_path: Path) -> None:
    run(parrot, tmp_path)
    before = (tmp_path / "needle.json").read_text()
    assert run(copier, tmp_path, settings={"trials": 2, "weights": "others"}).score == Score(8, 8)
    assert (tmp_path / "needle.1.json").read_text() == before


def test_results_of_another_step_are_not_reused_though_the_fingerprint_of_the_weights_is_the_same(
    tmp_path: Path,
) -> None:
    run(parrot, tmp_path)
    later = run(copier, tmp_path, step=200)
    assert (later.step, later.score) == (200, Score(8, 8))


def test_the_picture_of_other_settings_does_not_stay_beside_new_results(tmp_path: Path) -> None:
    run(copier, tmp_path)
    before = (tmp_path / "needle.png").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        run_decoder(CountingCopier(stop=2), tmp_path, settings={"trials": 3})
    assert not (tmp_path / "needle.png").exists()
    assert (tmp_path / "needle.1.png").read_bytes() == before


def test_unreadable_results_are_renamed(tmp_path: Path) -> None:
    (tmp_path / "needle.json").write_text("{not json")
    assert run(copier, tmp_path).score == Score(8, 8)
    assert (tmp_path / "needle.1.json").read_text() == "{not json"


def test_the_heat_map_shows_scores_as_colours(tmp_path: Path) -> None:
    cells = [Cell(128, 0.5, 4, 4, 1.0, 1.0), Cell(256, 0.5, 0, 4, 0.1, 0.1)]
    draw_heat_map(NeedleResults("runs/x", 1, {}, [128, 256], [0.5], cells), tmp_path / "needle.png")
    picture = Image.open(tmp_path / "needle.png").convert("RGB")
    colours, counts = np.unique(np.asarray(picture).reshape(-1, 3), axis=0, return_counts=True)
    assert {(0, 158, 115), (213, 94, 0)} <= set(
        map(tuple, colours[counts > 1000].tolist())
    )  # green for all, vermilion for none
    assert sorted(path.name for path in tmp_path.iterdir()) == ["needle.png"]


def test_results_without_reach_get_it_when_resumed(tmp_path: Path) -> None:
    run(copier, tmp_path)
    content = json.loads((tmp_path / "needle.json").read_text())
    without = [None, {"from_first": 1, "from_last": 1}]  # as in older files
    for cell, old in zip(content["cells"], 2 * without, strict=True):
        cell["reach"] = old
    (tmp_path / "needle.json").write_text(json.dumps(content))
    model = CountingCopier()
    sampler = TaskSampler(ByteTokenizer())
    hybrid = make_hybrid("S", num_layers=2, num_heads=1, kind="homogeneous", local=1, stride=100, block_size=64)
    asked = NeedleResults("runs/x", 100, {"trials": 2}, list(GRID.lengths), list(GRID.depths))
    results = run_needles(
        model, sampler, GRID, asked, tmp_path, batch_size=8, device=torch.device("cpu"),
        reach=NeedleReach(hybrid, sampler, GRID),
    )  # fmt: skip
    assert model.calls == 0
    assert load_results(tmp_path / "needle.json") == results
    # The first block is a column that every position sees, and each sees its own; no head sees the second one of three.
    assert [cell.reach for cell in results.cells] == [CellReach(1, 1, 2, 2)] * 3 + [CellReach(-1, -1, 0, 2)]

    def drawn_again(length: int, depth: float) -> CellReach:
        raise AssertionError("the results know it")

    run_needles(
        model, sampler, GRID, asked, tmp_path, batch_size=8, device=torch.device("cpu"), reach=drawn_again
    )  # fmt: skip


def test_a_needles_reach_is_that_of_its_farthest_block() -> None:
    sampler = TaskSampler(ByteTokenizer())
    hybrid = make_hybrid("S", num_layers=3, num_heads=4, local=2, stride=3, kind="homogeneous")
    needs = NeedleReach(hybrid, sampler, GRID)
    for length, depth in GRID.cells:
        counts: list[int | None] = []
        seen: list[int] = []
        for trial in range(GRID.trials):
            sample = GRID.sample(sampler, length, depth, trial)
            query = len(sample.prompt) - 1
            (span,) = (range(*span) for span in sample.spans)
            assert len({key // hybrid.block_size for key in span}) >= 3
            counts += [reach(hybrid, length, query).layers_from_last(key) for key in span]
            masks = [mask_of(head, length // 16 + 1)[query // 16] for layer in hybrid.layers for head in layer.heads]
            seen.append(sum(all(mask[key // 16] for key in span) for mask in masks))
        found = needs(length, depth)
        assert found.from_last == (-1 if None in counts else max(filter(None, counts)))
        assert (found.direct_heads, found.heads) == (min(seen), 12)


def test_the_line_of_a_cell_says_how_few_heads_see_its_needle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = TaskSampler(ByteTokenizer())
    hybrid = make_hybrid("S", num_layers=1, num_heads=4, local=1, block_size=64)
    asked = NeedleResults("runs/x", 100, {"trials": 2}, list(GRID.lengths), list(GRID.depths))
    run_needles(
        CountingCopier(), sampler, GRID, asked, tmp_path, batch_size=8, device=torch.device("cpu"),
        reach=NeedleReach(hybrid, sampler, GRID),
    )  # fmt: skip
    assert "seen by 1 of 4 heads" in capsys.readouterr().out


def test_picture_and_table_show_needles_out_of_reach(tmp_path: Path) -> None:
    cells = [Cell(128, 0.5, 0, 4, 0.0, 0.0, CellReach(-1, -1)), Cell(256, 0.5, 4, 4, 1.0, 1.0, CellReach(1, 2))]
    results = NeedleResults("runs/x", 1, {}, [128, 256], [0.5], cells)
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(score_table(results))
    text = console.export_text()
    assert "· never" in text
    assert "100 · 2" in text
    draw_heat_map(results, tmp_path / "with.png")
    draw_heat_map(replace(results, cells=[replace(cell, reach=None) for cell in cells]), tmp_path / "without.png")
    pictures = [np.asarray(Image.open(tmp_path / name)) for name in ("with.png", "without.png")]
    assert (pictures[0] != pictures[1]).any()


def test_lengths_beyond_the_trained_one_are_evaluated_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = NeedleResults("runs/x", 100, {}, list(GRID.lengths), list(GRID.depths))
    sampler, decode = TaskSampler(ByteTokenizer()), partial(greedy_decode, copier)
    for length in (159, 160):
        folder = tmp_path / str(length)
        found = run_needles(
            decode, sampler, GRID, asked, folder, batch_size=8, device=torch.device("cpu"), trained_length=length
        )
        assert found.score == Score(8, 8)
        assert ("lengths=160 exceeds the trained length of 159 tokens" in capsys.readouterr().out) == (length == 159)


def test_the_weights_fingerprint_depends_on_the_shards(tmp_path: Path) -> None:
    content = np.random.default_rng().integers(256, size=300_000, dtype=np.uint8)
    for name in ("__0_0.distcp", "__0_1.distcp"):
        (tmp_path / name).write_bytes(content.tobytes())
    first = weights_fingerprint(tmp_path)
    (tmp_path / "progress.json").write_text("{}")
    assert weights_fingerprint(tmp_path) == first
    content[-1] ^= 1
    (tmp_path / "__0_1.distcp").write_bytes(content.tobytes())
    assert weights_fingerprint(tmp_path) != first


def test_the_layout_fingerprint_depends_on_layout_and_rotation() -> None:
    trained = PretrainConfig(model=ModelConfig(name="m"))
    wider = replace(trained, layout=replace(trained.layout, layers="DDSS"))
    slower = replace(trained, model=replace(trained.model, rotary_base=trained.model.rotary_base + 1))
    assert len({layout_fingerprint(each) for each in (trained, wider, slower)}) == 3


@pytest.mark.parametrize(
    ("checkpoint", "folder"),
    [
        ("runs/x", "runs/x/needle"),
        ("runs/x/checkpoints", "runs/x/needle"),
        ("runs/x/checkpoints/iter_0000100", "runs/x/needle/iter_0000100"),
    ],
)
def test_results_are_written_beside_the_checkpoint(checkpoint: str, folder: str) -> None:
    assert output_folder(NeedleConfig(checkpoint=checkpoint)).as_posix() == folder


def test_results_are_written_to_the_output_folder() -> None:
    assert output_folder(NeedleConfig(checkpoint="runs/x", output="elsewhere")).as_posix() == "elsewhere"
