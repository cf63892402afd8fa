"""An error in a saved file is reported in one line with the file, the setting and a remedy."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from s2train.command_line.composition import CONF, config_groups, explain, options_first, overrides_of, own_folders
from s2train.config import PretrainConfig, register
from s2train.errors import ConfigError
from tests.program import error_line, run

HEADER = "# @package _global_\ndefaults: [{/model: tiny_hybrid}, _self_]\n"


def composed_with(folder: Path, text: str) -> None:
    (folder / "experiment").mkdir()
    (folder / "experiment" / "mine.yaml").write_text(text)
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        compose("pretrain", [f"hydra.searchpath=[file://{folder}]", "+experiment=mine"])


@pytest.mark.parametrize(
    ("text", "problem", "remedy"),
    [
        (f"{HEADER}train: {{token: 1e6}}", "train.token: no such setting", "Did you mean train.tokens?"),
        (f"{HEADER}trian: {{steps: 5}}", "trian: no such setting", "Did you mean train?"),
        (
            f"{HEADER}train: {{tokens: 1M}}",
            "train.tokens: Value '1M'",
            "It takes float | None, without a unit: 1000000 or 1048576.",
        ),
        (f"{HEADER}train: 5", "train: 5 is no section", "Write one setting a line below train."),
        ("train: {steps: 5}", "its settings belong to the section experiment", "the line `# @package _global_`"),
        (HEADER.replace("tiny_hybrid", "tiny_hybird"), "model=tiny_hybird: unknown name", "There are 125m_dense, "),
        (HEADER.replace("/model", "override /lay"), "Could not override 'lay'", "Correct the file's defaults."),
    ],
)
def test_a_wrong_setting_of_a_saved_file_is_named(tmp_path: Path, text: str, problem: str, remedy: str) -> None:
    with pytest.raises(HydraException) as error:
        composed_with(tmp_path, text)
    groups = config_groups(CONF, tmp_path)
    line = explain(error.value, ["+experiment=mine"], groups, PretrainConfig)
    assert line.startswith(f"experiment/mine.yaml: {problem}")
    assert remedy in line
    assert "\n" not in line


@pytest.mark.parametrize(("line", "number"), [("train: [1, 2", 4), ("train:\n\tsteps: 5", 4), ("train: {steps: 5", 4)])
def test_a_file_that_is_not_yaml_is_named_with_its_line(tmp_path: Path, line: str, number: int) -> None:
    with pytest.raises(ConfigError, match=rf"^experiment=mine: .*experiment/mine.yaml, line {number} is not YAML"):
        composed_with(tmp_path, f"{HEADER}{line}\n")


def test_a_folder_of_own_experiments_is_searched_for_names(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(HEADER)
    for options in (["--config-dir", str(tmp_path)], [f"--config-dir={tmp_path}"]):
        assert own_folders(options) == [tmp_path]
        assert overrides_of([*options, "seed=1", "--cfg=job"]) == ["seed=1"]
    outcome = run("pretrain.py", "--config-dir", str(tmp_path), "+experiment=mime")
    assert "Did you mean +experiment=mine?" in error_line(outcome)
    outcome = run("pretrain.py", "--config-dir", str(tmp_path), "+experiment=mine", "train.stpes=5")
    assert error_line(outcome).startswith("error: train.stpes=5: no such setting.")


def test_options_may_stand_between_settings() -> None:
    given = ["+model=tiny_hybrid", "-m", "--config-dir", "mine", "seed=1,2", "--cfg", "job", "--info", "~optim"]
    assert options_first(given) == [*given[1:4], *given[5:], given[0], given[4]]
    outcome = run("pretrain.py", "+model=tiny_hybrid", "--config-dir", str(CONF), "train.stpes=5")
    assert error_line(outcome).startswith("error: train.stpes=5: no such setting.")
