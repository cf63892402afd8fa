import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from s2train.attention.coverage import coverage_report
from s2train.config import PretrainConfig, head_dim
from s2train.costs.memory import GIB
from s2train.costs.parameters import total_parameters
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.planning import check, compose_run, hybrid_layout
from s2train.planning.targets import target_gpu
from s2train.study import variants
from s2train.study.files import Folders
from s2train.study.plan import plan_table
from s2train.study.settings import VOCABULARY, Recipe, micro_batch, run_documents, steps_of, train_settings
from s2train.study.variants import (
    MATCHED,
    MODEL,
    PHASES,
    REHEARSAL,
    RUNS,
    SEEDS,
    VARIANTS,
    Run,
    attention_settings,
    find_run,
    matched_window,
    run_density,
)

RECIPE = Recipe(1e-3, 1 << 17)


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path, Path("launch"))


@cache
def density(variant: str, phase: str) -> float:
    own = PHASES[phase]
    return run_density([*own.model, *attention_settings(variant, own)], own.length)


@cache
def composed(run: Run) -> PretrainConfig:
    return compose_run(train_settings(Folders(Path("study"), Path("launch")), run, RECIPE))


def on_mock_data(cfg: PretrainConfig) -> PretrainConfig:
    return replace(cfg, data=replace(cfg.data, path="mock", valid_path=None))


@pytest.mark.parametrize(
    ("variant", "phase"),
    [
        *itertools.product(["window", "window_sinks", "alternating", "index"], ["16k", "32k", "16k-40m"]),
        ("wide", "16k"),
        ("moba", "16k"),  # other scorers select the same number of blocks
        ("sea", "16k"),
    ],
)
def test_matched_blocks_are_as_dense_as_the_hybrid(variant: str, phase: str) -> None:
    # A block more or less of the window changes the density by about 0.005 at 16k tokens.
    assert density(variant, phase) == pytest.approx(density("hybrid", phase), abs=0.003)


@pytest.mark.parametrize("variant", ["moba", "index", "sea"])
def test_a_selection_fits_an_h100(variant: str) -> None:
    assert check(on_mock_data(composed(Run(variant))), 1, target_gpu("h100-80gb")).fits


@pytest.mark.parametrize("phase", ["16k", "32k", "16k-40m"])
def test_grouped_heads_differ_and_see_fewer_blocks_together_at_the_hybrids_density(phase: str) -> None:
    own = PHASES[phase]
    layout = hybrid_layout(compose_run([*own.model, *attention_settings("grouped", own)]))
    [share] = {run.union.fraction for run in coverage_report(layout, own.length).runs}
    assert 0.5 < share < 0.6
    assert len(set(layout.layers[1].heads)) > 1
    assert density("grouped", phase) == pytest.approx(density("hybrid", phase), abs=0.003)


def test_wide_heads_see_all_blocks_together_and_more_local_ones() -> None:
    settings = attention_settings("wide", PHASES["16k"])
    assert "local:22" in settings[1]  # as docs/corpus.md says; the hybrid has 16
    layout = hybrid_layout(compose_run([*MODEL, *settings]))
    assert {run.union.fraction for run in coverage_report(layout, 16384).runs} == {1.0}


@pytest.mark.parametrize("phase", ["16k", "16k-40m"])
def test_hyper_has_as_many_dense_layers_as_the_hybrid_and_is_about_as_dense(phase: str) -> None:
    found, wanted = (
        hybrid_layout(compose_run([*PHASES[phase].model, *attention_settings(variant, PHASES[phase])]))
        for variant in ("hyper", "hybrid")
    )
    assert [layer.is_dense for layer in found.layers] == [layer.is_dense for layer in wanted.layers]
    assert density("hyper", phase) == pytest.approx(density("hybrid", phase), abs=0.025)


def test_the_tier_has_two_seeds_of_every_kind_and_40m_parameters(folders: Folders) -> None:
    runs = [run for run in RUNS if run.phase == "16k-40m"]
    assert {run.seed for run in runs} == {1, 2}
    assert len({run.variant for run in runs}) == 8
    assert len(runs) == 16
    cfg = compose_run(train_settings(folders, runs[0], Recipe(1e-3, 1 << 15)))
    assert (cfg.train.steps, cfg.train.global_batch_size, head_dim(cfg.model)) == (2000, 2, 64)
    assert total_parameters(cfg.model, hybrid_layout(cfg).layers) == pytest.approx(40e6, rel=0.05)


@pytest.mark.parametrize("run", REHEARSAL, ids=lambda run: run.name)
def test_a_rehearsal_is_small_and_takes_the_study_s_tokenizer(folders: Folders, run: Run) -> None:
    cfg = compose_run(train_settings(folders, run, Recipe(3e-3, 2048)))
    assert cfg.model.vocab_size == VOCABULARY
    assert (cfg.train.steps, cfg.train.global_batch_size, cfg.evaluation.batches) == (64, 8, 4)
    assert check(on_mock_data(cfg), 1, target_gpu("h100-80gb")).memory.total < 4 * GIB
    assert density("hybrid", "rehearsal") < 0.7


def test_no_other_window_is_nearer_to_the_hybrids_density() -> None:
    settings, wanted = VARIANTS["window"], density("hybrid", "16k")
    found = matched_window(settings, 16384)
    missed = {
        window: abs(run_density([*MODEL, *(s.replace(MATCHED, str(window)) for s in settings)], 16384) - wanted)
        for window in (found - 1, found, found + 1)
    }
    assert min(missed, key=missed.__getitem__) == found


@pytest.mark.parametrize("run", [run for run in RUNS if run.seed == SEEDS[0]], ids=lambda run: run.name)
def test_every_run_fits_an_h100(run: Run) -> None:
    cfg = on_mock_data(composed(run))
    h100: Hardware = target_gpu("h100-80gb")
    assert check(cfg, 1, h100).fits
    assert cfg.train.seq_length == PHASES[run.phase].length


def test_variants_differ_in_attention_alone() -> None:
    first, *others = (composed(Run(variant)) for variant in VARIANTS)
    for other in others:
        assert (other.train, other.optim, other.data, other.seed) == (first.train, first.optim, first.data, first.seed)


def test_a_new_variant_is_one_entry(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "mine", ("layout.layers=DS",))
    cfg = compose_run(train_settings(folders, find_run("mine", "16k", 1), RECIPE))
    assert (cfg.layout.layers, cfg.model.name) == ("DS", "mine")


def test_the_64k_phase_is_dense_and_starts_from_the_32k_run(folders: Folders) -> None:
    run = Run("window", "64k")
    cfg = compose_run(train_settings(folders, run, RECIPE))
    assert cfg.layout.layers == "D"
    assert cfg.checkpoint.resume == str(folders.run(Run("window", "32k")))
    before, last = steps_of(run, RECIPE)
    assert (cfg.optim.decay_steps, cfg.train.steps) == (before, last)
    assert (last - before) * RECIPE.batch_tokens == pytest.approx(20e6, rel=0.01)


@pytest.mark.parametrize(("variant", "frozen"), [("dense", 0), ("hyper", 0), ("index", 100)])
def test_a_run_from_dense_starts_from_the_weights_of_its_seeds_dense_run(
    variant: str, frozen: int, folders: Folders
) -> None:
    run, recipe = Run(variant, "16k-40m-from-dense", seed=2), Recipe(1e-3, 1 << 15)
    cfg = compose_run(train_settings(folders, run, recipe))
    assert cfg.checkpoint.resume == str(folders.run(Run("dense", "16k-40m", seed=2)))
    assert cfg.checkpoint.weights_only
    assert steps_of(run, recipe) == (0, cfg.train.steps) == (0, 500)
    assert cfg.train.freeze_trunk_steps == frozen
    assert (cfg.optim.warmup_steps, cfg.optim.second_warmup_steps) == (25, 25)  # a trunk that starts later warms up too
    before = compose_run(train_settings(folders, Run("dense", "16k-40m", seed=2), recipe))
    assert cfg.seed != before.seed  # another order of the data
    assert cfg.optim.decay_steps is None


@pytest.mark.parametrize("variant", ["hybrid", "index"])
def test_a_run_on_needles_starts_from_its_variants_weights(variant: str, folders: Folders) -> None:
    cfg = compose_run(train_settings(folders, run := Run(variant, "16k-needles", seed=2), RECIPE))
    assert cfg.checkpoint.resume == str(folders.run(Run(variant, "16k", seed=2)))
    assert cfg.checkpoint.weights_only
    assert steps_of(run, RECIPE) == (0, cfg.train.steps)
    assert (cfg.optim.lr, cfg.train.freeze_trunk_steps) == (RECIPE.lr / 2, 0)
    made = {str(documents.prefix) for documents in run_documents(folders, run, RECIPE)}
    assert made == {path for path in cfg.data.path if isinstance(path, str)}
    assert cfg.data.valid_path == str(folders.held_out_data)


@pytest.mark.parametrize(("variant", "phase", "setting"), [("widow", "16k", "variant"), ("window", "61k", "phase")])
def test_an_unknown_name_is_rejected_with_the_nearest(variant: str, phase: str, setting: str) -> None:
    with pytest.raises(ConfigError, match="Did you mean") as caught:
        find_run(variant, phase, 1)
    assert caught.value.setting == setting


@pytest.mark.parametrize(
    ("length", "sequences", "gpus", "size"),
    [(16384, 8, 1, 4), (16384, 8, 2, 4), (16384, 8, 4, 2), (32768, 4, 1, 2), (65536, 2, 1, 1), (16384, 3, 1, 1)],
)
def test_micro_batches_hold_65536_tokens_where_the_batch_divides_so(
    length: int, sequences: int, gpus: int, size: int
) -> None:
    assert micro_batch(length, sequences, gpus) == size


def test_more_gpus_that_do_not_divide_the_batch_are_rejected(folders: Folders) -> None:
    settings = [*train_settings(folders, Run("dense"), RECIPE, gpus=3), "data.path=mock", "data.valid_path=null"]
    with pytest.raises(ConfigError, match="global_batch_size") as caught:
        check(compose_run(settings), 3, target_gpu("h100-80gb"))
    assert caught.value.setting == "train.global_batch_size"


def test_two_gpus_take_half_as_long_as_one(folders: Folders) -> None:
    runs = [variants.Run("hybrid")]
    seconds = [
        float(list(plan_table(folders, RECIPE, gpus, "h100-80gb", runs).columns[4].cells)[-1].replace(",", ""))
        for gpus in (1, 2)
    ]
    assert seconds[1] == pytest.approx(seconds[0] / 2, rel=0.1)
