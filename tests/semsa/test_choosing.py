"""The choice of each head's rule: a known right answer, budgets, constraints, files, and what is rejected."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from s2train.errors import ConfigError
from s2train.planning import compose_run, hybrid_layout
from s2train.semsa.choosing import choose, choose_layout
from s2train.semsa.config import ChooseLayoutConfig, LibraryConfig
from s2train.semsa.layouts import build_layout
from s2train.semsa.profile import Profile, check_same_model, load_profile, ranked_columns
from s2train.semsa.rules import make_library
from tests.semsa.toy import BLOCK, BLOCKS, FAR, LENGTH, LIBRARY, profile_of

pytest.importorskip("scipy", reason="the extra semsa is not installed")

NEAR = 3
COPYING = 2  # the number of the copying head


@pytest.fixture(scope="module")
def profile() -> Profile:
    return profile_of([NEAR, NEAR, FAR, NEAR])


def settings(**changed: Any) -> ChooseLayoutConfig:
    own = {"profile": "p.npz", "output": "c.yaml", "density": 0.45, "whole_groups": False} | changed
    return ChooseLayoutConfig(**own)


def reach(profile: Profile, chosen: Any, head: int) -> bool:
    """Whether a head keeps what lies `FAR` before a query, wherever there is one."""
    query = torch.arange(FAR // BLOCK, BLOCKS)
    return bool(build_layout(chosen.layout, profile).layers[0].heads[head].keep(query, query - FAR // BLOCK).all())


def test_the_head_that_copies_from_afar_keeps_it_and_the_others_give_way(profile: Profile) -> None:
    chosen = choose(settings(), profile)
    assert [reach(profile, chosen, head) for head in range(4)] == [False, False, True, False]
    assert chosen.densities[0] <= 0.45
    # what is given up hardly matters, and the other way round it matters a lot
    assert chosen.solution.cost < 0.05 * profile.costs("squared")[0, COPYING, 0]


def test_a_group_of_heads_gets_one_rule(profile: Profile) -> None:
    rules = choose(settings(whole_groups=True, density=0.6), profile).solution.rules
    assert (rules[:, ::2] == rules[:, 1::2]).all()
    assert rules[0, 0] != rules[0, COPYING]


def test_each_length_keeps_its_own_budget(profile: Profile) -> None:
    chosen = choose(settings(density=[0.7, 0.35], lengths=[LENGTH // 2, LENGTH]), profile)
    assert chosen.densities[0] <= 0.7
    assert chosen.densities[1] <= 0.35
    assert choose(settings(density=[0.35, 0.7], lengths=[LENGTH, LENGTH // 2]), profile).densities == chosen.densities


def test_with_room_for_everything_every_head_loses_nothing(profile: Profile) -> None:
    chosen = choose(settings(density=1.0), profile)
    assert chosen.solution.cost < 1e-6
    assert chosen.costs[0].seq_length == LENGTH


def test_tensor_parallel_ranks_keep_about_equally_many_blocks(profile: Profile) -> None:
    hybrid = build_layout(choose(settings(tp=2, imbalance=0.15, density=0.6), profile).layout, profile)
    kept = hybrid.layers[0].kind.kept_positions(hybrid.layers[0], LENGTH)
    halves = sum(kept[:2]), sum(kept[2:])
    assert max(halves) <= 1.15 * sum(halves) / 2


@pytest.mark.parametrize(("rules", "complete"), [([0, 1], False), ([0, 5, 6], True)])
def test_a_layout_that_sees_not_everything_permits_it(profile: Profile, rules: list[int], complete: bool) -> None:
    assert choose(settings(density=0.6, rules=rules), profile).layout.allow_partial_coverage is not complete


def test_chosen_columns_are_those_that_matter_to_the_group() -> None:
    blocks = np.zeros((4, 1, 4, 6, 6), dtype=np.float32)
    blocks[2, 0, 1, 4:, 2] = 5  # squared, of the second head of the first group
    blocks[2, 0, 2, 5, 1] = 3
    blocks[2, 0, 0, 4, 4] = 99  # in the window: no column
    order = ranked_columns(blocks, 2)
    assert order[0, :, 0].tolist() == [2, 2, 1, 1]
    (rule,) = make_library(LibraryConfig(spans=[], stripes=[], columns=[[2, 1]], sinks=1, dense=False))
    found = rule.of_group(1, order[0, 3].tolist())
    assert found == {"kind": "global_blocks", "local": 2, "globals": [0, 1]}


@pytest.mark.parametrize(("rules", "partial"), [([0, 1], True), ([0, 5, 6], False)])
def test_a_written_layout_is_what_was_chosen_and_says_what_it_misses(
    profile: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str], rules: list[int], partial: bool
) -> None:
    profile.save(tmp_path / "p.npz")
    written = {"profile": str(tmp_path / "p.npz"), "output": str(tmp_path / "c.yaml")}
    cfg = settings(**written, density=0.6, rules=rules)
    chosen = choose_layout(cfg)
    assert ("allow_partial_coverage=true" in capsys.readouterr().out) is partial
    assert chosen.layout.allow_partial_coverage is partial
    shape = ["model.num_layers=1", "model.hidden_size=128", "model.num_query_groups=2"]
    run = compose_run(["+model=tiny_dense", f"layout=file:{tmp_path / 'c.yaml'}", *shape])
    assert hybrid_layout(run).layers == build_layout(chosen.layout, profile).layers
    assert json.loads((tmp_path / "c.json").read_text())["heads"] == chosen.solution.rules.tolist()
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_small_changes_of_the_loss_stay_on_one_line(
    profile: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(profile, rules=profile.rules / 12345).save(tmp_path / "p.npz")
    choose_layout(settings(profile=str(tmp_path / "p.npz"), output=str(tmp_path / "c.yaml"), density=0.6))
    lines = capsys.readouterr().out.splitlines()
    (last,) = [number for number, line in enumerate(lines) if line.split()[:2] == ["256", "0.6"]]
    assert len(lines[last].split()) == 11
    assert re.search(r"e-0\d ", lines[last])
    assert not lines[last + 1].strip()


def test_a_saved_profile_is_read_as_it_was(profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "p.npz")
    read = load_profile(tmp_path / "p.npz")
    assert np.array_equal(read.blocks, profile.blocks)
    assert np.array_equal(read.rules, profile.rules)
    assert (read.library, read.model, read.columns) == (profile.library, profile.model, None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"density": 0.05},
            r"density=0.05: at 256 tokens the sparsest rules keep 0.0661. Set density=0.07 or more",
        ),
        (
            {"density": 0.5, "rules": [6]},
            r"density=0.5: at 256 tokens the sparsest rules keep 1.0000. Set density=1, or allow sparser rules",
        ),
        ({"density": 1.5}, "density=1.5: no share"),
        ({"density": True}, "density=true: no share"),
        ({"density": [True]}, r"density=\[true\]: no share"),
        ({"density": [0.5, 0.5]}, r"density=\[0.5,0.5\]: 2 densities for 1 lengths"),
        ({"lengths": [LENGTH * 2]}, r"lengths=\[512\]: the profile ends at 256 tokens"),
        ({"lengths": [LENGTH, LENGTH]}, r"lengths=\[256,256\]: names a length twice"),
        ({"lengths": [8]}, r"lengths=\[8\]: below a block of 16"),
        ({"cost": "square"}, "cost=square: unknown"),
        ({"imbalance": float("nan")}, "imbalance=nan: not 0 or more"),
        ({"time_limit": float("nan")}, "time_limit=nan: not more than 0"),
        ({"time_limit": -1.0}, "time_limit=-1.0: not more than 0"),
        ({"rules": []}, r"rules=\[\]: leaves no rule"),
        ({"rules": [99]}, r"rules=\[99\]: the profile has no rule 99"),
        ({"tp": 3}, "tp=3: doesn't divide the 2 KV heads"),
    ],
)
def test_what_cannot_be_is_rejected(profile: Profile, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        choose(settings(**changed), profile)


def test_a_profile_of_other_weights_is_rejected(profile: Profile) -> None:
    with pytest.raises(ConfigError, match=r"^profile=p.npz: is of runs/toy \(weights 0\), not of runs/mine \(1\)"):
        check_same_model(profile, "1", "p.npz", Path("runs/mine"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "there is no such file"), (b"x", r"is no profile\. "), (b"", r"is no profile \(No data left in file\)\. ")],
)
def test_a_file_that_is_no_profile_is_rejected(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "p.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^profile={path}: {problem}"):
        load_profile(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"spans": [[1]]}, r"library.spans=\[\[1\]\]: no list of pairs"),
        ({"spans": [[True, 0]]}, r"library.spans=\[\[true,0\]\]: no list of pairs"),
        ({"columns": [[1, True]]}, r"library.columns=\[\[1,true\]\]: no list of pairs"),
        ({"spans": [[0, 0]]}, r"library.base=0: too small"),
        ({"spans": [[1.5, 0]]}, r"library.spans=1.5: a base that is no whole block"),
        ({"columns": [[1, 0]]}, r"library.columns=0: no columns to choose"),
        ({"columns": [[1, 2.5]]}, r"library.columns=2.5: a count that is no whole number"),
        ({"spans": [], "stripes": [], "dense": False}, r"library=\(these rules\): 0 rules"),
        ({"spans": [[n, 0] for n in range(1, 70)]}, r"library=\(these rules\): 7\d rules"),
    ],
)
def test_a_library_that_cannot_be_is_rejected(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        make_library(replace(LIBRARY, **changed))
