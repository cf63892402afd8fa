"""Old names of settings are accepted, with one warning, and mean what the current names mean."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from s2train.checkpoints.folders import read_config, write_config
from s2train.checkpoints.setting_changes import changes_between
from s2train.command_line.composition import CONF, hydra_arguments
from s2train.command_line.old_names import OLD_NAMES, rename_saved
from s2train.command_line.program import settings_before_options
from s2train.config import PretrainConfig, register, to_object
from s2train.errors import ConfigError
from s2train.needles.config import NeedleConfig
from s2train.planning import compose_run
from s2train.sweeps.jobs import changed_setting
from s2train.sweeps.names import folder_name, job_folder
from tests.program import SMALL, Outcome, error_line, metrics, pretrain, run

RENAMED = "the setting backend is now called layer_backend; the old name still works"
WARNING = f"warning: {RENAMED}"
MODEL = "+model=tiny_hybrid"


def composed(folder: Path, *overrides: str) -> PretrainConfig:
    """Settings composed with a user's folder of YAML files beside conf/."""
    register()
    given = [f"hydra.searchpath=[file://{folder}]", *hydra_arguments(overrides, PretrainConfig)]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = to_object(compose("pretrain", given))
    assert isinstance(cfg, PretrainConfig)
    return cfg


def file_in(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return folder


def warnings(outcome: Outcome) -> list[str]:
    return [line for line in outcome.err.splitlines() if line.startswith("warning: ")]


def test_a_renamed_setting_stays_in_its_section_and_its_new_name_is_final() -> None:
    for old, new in OLD_NAMES.items():
        assert old.rpartition(".")[0] == new.rpartition(".")[0]
        assert new not in OLD_NAMES


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_a_command_line_sets_the_setting_by_its_old_name(sign: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compose_run([MODEL, f"{sign}backend=local"]).layer_backend == "local"
    assert capsys.readouterr().err.splitlines() == [WARNING]


def test_a_current_name_brings_no_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert compose_run([MODEL, "layer_backend=local", "attention_backend=torch"]).layer_backend == "local"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("order", [1, -1])
def test_both_names_on_a_command_line_are_rejected(order: int) -> None:
    with pytest.raises(ConfigError, match=r"^backend=te: .* layer_backend.* Set layer_backend alone"):
        compose_run([MODEL, *["backend=te", "layer_backend=local"][::order]])


def test_a_program_without_the_setting_takes_no_old_name_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert hydra_arguments(["backend=te"], NeedleConfig) == ["backend=te"]
    assert capsys.readouterr().err == ""


def test_a_program_with_options_warns_once_however_often_it_composes(capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_before_options([MODEL, "backend=local", "--quick"])[:-1]
    assert [compose_run(settings).layer_backend for _ in range(2)] == ["local", "local"]
    assert capsys.readouterr().err.splitlines() == [WARNING]


def test_one_rank_of_a_plan_warns_in_one_line_and_both_names_are_rejected() -> None:
    planned = ["pretrain.py", "+model=7b_hybrid", "plan.device=h100-80gb", "plan.count=8", "backend=local"]
    both = run(*planned, "layer_backend=te", processes=0)
    assert (both.status, error_line(both)[:21]) == (2, "error: backend=local:")
    done = run(*planned, processes=2)
    assert (done.status, warnings(done)) == (0, [WARNING])
    assert "estimate, layer_backend=local" in done.out


MINE = "# @package _global_\nbackend: local\nmodel: {name: mine}\n"


def test_a_yaml_file_may_use_the_old_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = file_in(tmp_path, "mine/mine.yaml", MINE)
    assert composed(folder, MODEL, "+mine=mine").layer_backend == "local"
    assert capsys.readouterr().err.splitlines() == [f"warning: mine/mine: {RENAMED}"]


def test_a_command_line_overrides_the_old_name_in_a_yaml_file(tmp_path: Path) -> None:
    folder = file_in(tmp_path, "mine/mine.yaml", MINE)
    assert composed(folder, MODEL, "+mine=mine", "layer_backend=auto").layer_backend == "auto"
    assert composed(folder, MODEL, "+mine=mine", "backend=te").layer_backend == "te"


def test_a_yaml_file_keeps_what_it_interpolates(tmp_path: Path) -> None:
    folder = file_in(tmp_path, "mine/mine.yaml", MINE + "run_dir: runs/${model.name}/${seed}\n")
    assert composed(folder, MODEL, "+mine=mine", "seed=7").run_dir == "runs/mine/7"


def test_old_names_may_be_interpolated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compose_run([MODEL, "backend=local", "run_dir=runs/${backend}"]).run_dir == "runs/local"
    assert compose_run([MODEL, "run_dir=runs/${backend}"]).run_dir == "runs/auto"
    folder = file_in(tmp_path, "mine/mine.yaml", "# @package _global_\nrun_dir: runs/${backend}\n")
    assert composed(folder, MODEL, "+mine=mine", "layer_backend=te").run_dir == "runs/te"
    assert capsys.readouterr().err.splitlines() == [WARNING, WARNING, f"warning: mine/mine: {RENAMED}"]


def test_a_setting_of_that_name_in_another_section_is_not_renamed(tmp_path: Path) -> None:
    folder = file_in(tmp_path, "model/mine.yaml", "backend: local\nname: mine\n")
    with pytest.raises(Exception, match="Key 'backend' not in 'ModelConfig'"):
        composed(folder, "+model=mine")


def test_a_yaml_file_with_both_names_is_rejected_in_one_line(tmp_path: Path) -> None:
    folder = file_in(tmp_path, "mine/mine.yaml", f"{MINE}layer_backend: te\n")
    outcome = run("pretrain.py", "--config-dir", str(folder), MODEL, "+mine=mine", "plan=true", processes=0)
    assert (outcome.status, len(outcome.err.splitlines())) == (2, 1)
    assert error_line(outcome).startswith("error: backend=local: ")


@pytest.mark.parametrize("where", ["command line", "sweeper"])
def test_a_sweep_varies_the_setting_by_its_old_name(where: str, tmp_path: Path) -> None:
    params = "# @package _global_\nhydra: {sweeper: {params: {backend: 'auto,local'}}}\n"
    folder, swept = file_in(tmp_path, "mine/mine.yaml", params), "backend=auto,local"
    if where == "sweeper":
        swept = "+mine=mine"
    sweep_dir = f"hydra.sweep.dir={tmp_path}/sweep"
    settings = [
        "--config-dir",
        str(folder),
        *SMALL,
        "train.steps=2",
        sweep_dir,
        "plan.count=1",
        "optim.warmup_steps=0",
        swept,
    ]
    done = run("pretrain.py", "-m", *settings, processes=0).succeeded()
    assert len(warnings(done)) == 1
    assert "layer_backend=auto" in done.out
    assert "layer_backend=local" in done.out


def test_a_sweep_finds_the_folder_that_an_earlier_version_named(tmp_path: Path) -> None:
    def folder(overrides: Sequence[str], swept: str) -> Path:
        return tmp_path / folder_name(overrides, [swept])

    earlier = folder([MODEL, "backend=te"], "backend")
    earlier.mkdir()
    assert job_folder(tmp_path, [MODEL, "layer_backend=te"], ["layer_backend"]) == earlier
    other = job_folder(tmp_path, [MODEL, "layer_backend=local"], ["layer_backend"])
    assert other == folder([MODEL, "layer_backend=local"], "layer_backend")


def saved_by_an_earlier_version(cfg: PretrainConfig, folder: Path, more: str = "") -> Path:
    write_config(cfg, folder / "config.yaml")
    text = (folder / "config.yaml").read_text()
    assert "\nlayer_backend: " in text
    (folder / "config.yaml").write_text(text.replace("\nlayer_backend: ", "\nbackend: ") + more)
    return folder


def test_an_old_checkpoint_s_settings_are_read_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = compose_run([MODEL, "layer_backend=te"])
    saved = read_config(saved_by_an_earlier_version(cfg, tmp_path))
    assert saved == cfg
    assert changes_between(saved, cfg) == []
    (change,) = changes_between(saved, replace(cfg, layer_backend="local"))
    assert (str(change), change.is_of_the_experiment) == ("layer_backend te → local", False)
    assert capsys.readouterr().err == ""


def test_saved_settings_with_both_names_are_rejected(tmp_path: Path) -> None:
    folder = saved_by_an_earlier_version(compose_run([MODEL]), tmp_path, "layer_backend: te\n")
    with pytest.raises(ConfigError, match="backend=auto: it is the old name of layer_backend"):
        read_config(folder)


def test_a_finished_job_of_an_old_sweep_is_compared_by_the_current_name(tmp_path: Path) -> None:
    cfg = compose_run([MODEL, "layer_backend=te"])
    saved_by_an_earlier_version(cfg, tmp_path)
    assert changed_setting(tmp_path, cfg) is None
    assert changed_setting(tmp_path, replace(cfg, layer_backend="local")) == "layer_backend=te"


def test_names_in_sections_and_in_files_of_a_section_are_renamed() -> None:
    names = {"optim.rate": "optim.lr"}
    whole, section, other = {"optim": {"rate": 1}}, {"rate": 1}, {"rate": 1}
    assert len(rename_saved(whole, old_names=names)) == len(rename_saved(section, "optim", names)) == 1
    assert (whole, section) == ({"optim": {"lr": 1}}, {"lr": 1})
    assert rename_saved(other, "train", names) == []
    assert other == {"rate": 1}


@pytest.mark.slow
def test_a_run_resumes_from_an_old_checkpoint(tmp_path: Path) -> None:
    settings = ["train.steps=3", "layer_backend=local"]
    assert pretrain(tmp_path, *settings, "train.exit_step=1").status == 0
    for path in tmp_path.rglob("config.yaml"):
        text = path.read_text()
        path.write_text(text.replace("\nlayer_backend: ", "\nbackend: "))
        assert "layer_backend" not in OmegaConf.load(path)
    resumed = pretrain(tmp_path, *settings)
    assert (resumed.status, warnings(resumed)) == (0, [])
    assert [record["step"] for record in metrics(tmp_path) if "loss" in record] == [1, 2, 3]
