"""launch/profile_attention.py on a trained model: under any division, after an interruption, and what is rejected."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s2train.environment.hardware import detect_own
from s2train.errors import ConfigError
from s2train.semsa.config import CalibrationDataConfig, LibraryConfig, ProfileAttentionConfig
from s2train.semsa.profile import Profile, load_profile
from s2train.semsa.profile_request import read_request
from tests.program import SMALL, Outcome, run

SETTINGS = ["train.steps=2", "optim.warmup_steps=1", "evaluation.interval=0", "layout.block_size=16"]
PROFILE = ["samples=4", "library.spans=[[1,0],[2,0.25]]", "library.stripes=[[1,4]]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint of two steps, and a sparse one."""
    folder = tmp_path_factory.mktemp("semsa")
    for name, layout in (("dense", "dense"), ("sparse", "s2_b16_l2_v4")):
        run("pretrain.py", *SMALL, f"layout={layout}", *SETTINGS, f"run_dir={folder / name}", cwd=folder).succeeded()
    return folder


def profiled(folder: Path, name: str, *changed: str, processes: int = 1) -> tuple[Profile, Outcome]:
    output = folder / f"{name}.npz"
    arguments = [f"checkpoint={folder / 'dense'}", f"output={output}", *PROFILE, *changed]
    outcome = run("profile_attention.py", *arguments, processes=processes, cwd=folder).succeeded()
    return load_profile(output), outcome


@pytest.fixture(scope="module")
def of_one_sample(folder: Path) -> Path:
    profiled(folder, "one", "samples=1")
    return folder / "one.npz"


def assert_same(found: Profile, expected: Profile, tolerance: float) -> None:
    for name in ("blocks", "rules"):
        a, b = getattr(found, name), getattr(expected, name)
        scale = np.abs(b).reshape(4, -1).max(1)
        error = np.abs(a - b).reshape(4, -1).max(1)
        assert (error <= tolerance * scale).all(), (name, error / scale)
    assert found.tokens == expected.tokens


@pytest.mark.slow
def test_every_division_measures_the_same(folder: Path) -> None:
    alone, _ = profiled(folder, "alone", "verify=5", "verify_samples=1")
    assert alone.blocks.shape == (4, 4, 4, 8, 8)
    assert alone.rules.shape == (4, 4, 4, 4, 8)
    mass, dense = alone.blocks[3].astype(np.float64), alone.rules[:, :, :, 3]
    assert np.allclose(mass.sum((2, 3)), 4 * 128)  # each row's probabilities sum to 1
    assert np.abs(dense).max() < 1e-6  # what keeps everything has no effect
    verified = json.loads((folder / "alone-verify.json").read_text())
    assert verified["correlations"]["rules"]["signed, data"] > 0.9
    for name, changed in (("tp", ["tp=2"]), ("dp", [])):
        shared, _ = profiled(folder, name, *changed, processes=2)
        assert_same(shared, alone, 2e-5)
    again, _ = profiled(folder, "recomputed", "recompute=true")
    assert_same(again, alone, 2e-5)


@pytest.mark.slow
def test_an_interrupted_profile_resumes_from_its_sums(folder: Path) -> None:
    whole, _ = profiled(folder, "whole", "labels=data")
    half, _ = profiled(folder, "half", "labels=data", "samples=2")
    about = dict(half.about) | {"samples": 4, "done": 2}
    Profile(half.blocks, half.rules, None, about).save(folder / "rest.unfinished.npz")
    half.save(folder / "rest.npz")  # what overwrite=true replaces, which a restart after preemption keeps
    rest, outcome = profiled(folder, "rest", "labels=data", "overwrite=true")
    assert "resumed after 2" in outcome.out
    assert not (folder / "rest.unfinished.npz").exists()
    assert_same(rest, whole, 2e-6)
    Profile(half.blocks, half.rules, None, about | {"seed": 5}).save(folder / "other.unfinished.npz")
    arguments = [f"checkpoint={folder / 'dense'}", f"output={folder / 'other.npz'}", *PROFILE, "labels=data"]
    outcome = run("profile_attention.py", *arguments, cwd=folder)
    assert outcome.status != 0
    assert "is unfinished, and was made with another seed" in outcome.err
    Profile(half.blocks, half.rules, None, about | {"done": 1}).save(folder / "other.unfinished.npz")
    outcome = run("profile_attention.py", *arguments, processes=2, cwd=folder)
    assert outcome.status != 0
    assert "holds 1 samples, which 2 data parallel ranks don't divide" in outcome.err


@pytest.mark.slow
def test_an_unfinished_profile_of_an_earlier_version_resumes(folder: Path, of_one_sample: Path) -> None:
    """Its model has no setting that a later version added."""
    begun = load_profile(of_one_sample)
    model = {name: value for name, value in begun.about["model"].items() if name not in ("qk_norm", "rope_scaling")}
    about = dict(begun.about) | {"model": model, "samples": 2}
    Profile(begun.blocks, begun.rules, None, about).save(folder / "earlier.unfinished.npz")
    found, outcome = profiled(folder, "earlier", "samples=2")
    assert "resumed after 1" in outcome.out
    assert found.tokens > begun.tokens


@pytest.mark.slow
def test_a_profile_that_was_killed_in_its_verification_is_verified_by_the_same_command(folder: Path) -> None:
    words = ["samples=1", "verify=3", "verify_samples=1"]
    profiled(folder, "killed", *words)
    output, verification = folder / "killed.npz", folder / "killed-verify.json"
    whole, before = json.loads(verification.read_text()), output.stat().st_mtime_ns
    verification.unlink()
    with pytest.raises(AssertionError, match="exists, and was made with another seed"):
        profiled(folder, "killed", *words, "seed=5")
    _, outcome = profiled(folder, "killed", *words)
    assert "resumed after 1" in outcome.out
    assert output.stat().st_mtime_ns == before
    rest = json.loads(verification.read_text())
    assert [rest[name] for name in ("blocks", "rules")] == [whole[name] for name in ("blocks", "rules")]
    with pytest.raises(AssertionError, match=r"killed\.npz: exists\. Add"):
        profiled(folder, "killed", *words)


def request(folder: Path, world_size: int = 1, **changed: Any) -> None:
    own = {"checkpoint": str(folder / "dense"), "output": str(folder / "new.npz")} | changed
    read_request(ProfileAttentionConfig(**own), world_size, detect_own())


@pytest.mark.slow
def test_what_cannot_be_profiled_is_rejected(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "there.npz").write_bytes(b"")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"checkpoint": str(folder / "sparse")}, "checkpoint=.*layers 0, 1, 2 don't attend to everything: what is"),
        ({"checkpoint": str(folder / "none")}, "checkpoint=.*no checkpoint there"),
        ({"seq_length": 256}, "seq_length=256: .* was trained with 128 tokens"),
        ({"block_size": 48}, "block_size=48: not supported"),
        ({"block_size": 128}, "block_size=128: sequences of 128 tokens have no two"),
        ({"samples": 0}, "samples=0: too small"),
        ({"samples": 3, "world_size": 2}, "samples=3: 2 data parallel ranks can't share"),
        ({"tp": 3}, "tp=3: doesn't divide .* processes, 1. Set tp to 1, or start .* --nproc-per-node 3"),
        ({"labels": "mine"}, "labels=mine: unknown"),
        ({"temperature": 0.0}, "temperature=0.0: must be above 0"),
        ({"precision": "fp8"}, "precision=fp8: unknown"),
        ({"output": str(folder / "there.npz")}, "output=.*there.npz: exists"),
        ({"output": "profile.json"}, "output=profile.json: is no .npz file"),
        ({"library": LibraryConfig(columns=[[1, 2]])}, "library.columns=.*: no profile says which columns matter"),
        ({"columns_from": "p.npz"}, "columns_from=p.npz: no rule has columns"),
        ({"data": CalibrationDataConfig(path="nothing")}, "data.path=.*nothing"),
    ]
    for changed, message in cases:
        with pytest.raises(ConfigError, match=f"^{message}"):
            request(folder, **changed)


@pytest.mark.slow
def test_columns_are_chosen_by_an_earlier_profile(folder: Path, of_one_sample: Path) -> None:
    found, _ = profiled(folder, "columns", "samples=1", "library.columns=[[1,2]]", f"columns_from={of_one_sample}")
    number = next(number for number, rule in enumerate(found.library) if rule.takes_columns)
    assert found.columns is not None
    chosen = found.columns[3, 2, :2].tolist()
    settings = found.settings_of(number, 3, 2)
    assert settings == {"kind": "global_blocks", "local": 1, "globals": sorted({0, *chosen})}
    # what the rule drops is what it doesn't name
    mass = found.blocks[3, 3, 2].astype(np.float64)
    kept = np.eye(8, dtype=bool) | np.isin(np.arange(8), settings["globals"])[None]
    assert np.allclose(found.rules[3, 3, 2, number].sum(), mass[~kept & np.tri(8, dtype=bool)].sum(), rtol=1e-4)


@pytest.mark.slow
def test_the_frontier_keeps_budgets_and_changes_nothing_where_everything_is_kept(
    folder: Path, of_one_sample: Path
) -> None:
    pytest.importorskip("scipy", reason="the extra semsa is not installed")
    output, names = folder / "frontier.json", ("squared", "mass", "window")
    arguments = [f"checkpoint={folder / 'dense'}", f"profile={of_one_sample}", f"output={output}"]
    arguments += ["samples=1", "densities=[0.7,1.0]", "draws=1"]
    run("layout_frontier.py", *arguments, cwd=folder, pictures=True).succeeded()
    content = json.loads(output.read_text())
    rows = content["rows"]
    assert all(row["density"] <= row["budget"] for row in rows)
    assert {row["layout"] for row in rows} >= {*names, "signed", "absolute", "random"}
    for row in rows:
        if row["budget"] == 1.0 and row["layout"] in names:
            assert abs(row["change"]) < 1e-6 * content["dense_loss"]
        elif row["layout"] == "window":
            assert abs(row["change"]) > 1e-6 * content["dense_loss"]
    assert output.with_suffix(".png").stat().st_size > 1000


@pytest.mark.slow
def test_an_interrupted_frontier_resumes_and_measures_the_rest_alike(folder: Path, of_one_sample: Path) -> None:
    pytest.importorskip("scipy", reason="the extra semsa is not installed")
    output = folder / "resumed.json"
    arguments = [f"checkpoint={folder / 'dense'}", f"profile={of_one_sample}", f"output={output}"]
    arguments += ["samples=1", "densities=[0.7]", "draws=1", f"layouts={folder / 'layouts'}"]
    assert run("layout_frontier.py", *arguments, cwd=folder).status == 0
    whole = json.loads(output.read_text())
    output.write_text(json.dumps(whole | {"rows": whole["rows"][:3], "finished": False}))
    outcome = run("layout_frontier.py", *arguments, cwd=folder).succeeded()
    assert "3 layouts are measured" in outcome.out
    rest = json.loads(output.read_text())
    assert rest["finished"]
    untimed = [[{**row, "evaluation_seconds": 0} for row in content["rows"]] for content in (whole, rest)]
    assert untimed[0] == untimed[1]
    assert {row["file"] for row in rest["rows"]} == {path.name for path in (folder / "layouts").iterdir()}
