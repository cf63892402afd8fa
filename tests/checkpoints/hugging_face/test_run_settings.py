"""Settings of an imported model, as files that Hydra composes."""

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from s2train.checkpoints.hugging_face.folder import write_weights
from s2train.checkpoints.hugging_face.run_settings import ModelFiles, model_name, read_settings, settings_json
from s2train.command_line.composition import CONF, config_groups
from s2train.config import (
    DataConfig,
    LayoutConfig,
    ModelConfig,
    PatternConfig,
    PretrainConfig,
    ScheduleConfig,
    TrainConfig,
    register,
    to_object,
)
from s2train.errors import ConfigError

MODEL = ModelConfig("start", 4, 64, 96, 4, 2, 16, 272, rotary_base=5000, rotary_percent=0.5, norm_epsilon=1e-6)
LAYOUT = LayoutConfig(
    "DSWS", 16, PatternConfig(local=2, stride=3), {"W": {"kind": "sliding_window", "window": 3}}, True
)
RUN = PretrainConfig(
    model=MODEL,
    layout=LAYOUT,
    schedule=ScheduleConfig("explicit", [[0, 1, 2, 3], [3, 2, 1, 0]]),
    data=DataConfig(tokenizer="/a folder/tokenizer.json", end_token="<|im_end|>"),
    train=TrainConfig(1000, 128, 16),
)


def composed(command: str, *overrides: str) -> PretrainConfig:
    """What a printed command runs."""
    _, program, option, conf, *settings = shlex.split(command)
    assert (program, option) == ("launch/pretrain.py", "--config-dir")
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        search = f"hydra.searchpath=[file://{conf}]"
        found = to_object(compose("pretrain", [search, *settings, *overrides]))
    assert isinstance(found, PretrainConfig)
    return found


def test_the_printed_command_composes_the_models_settings(tmp_path: Path) -> None:
    files = ModelFiles(RUN, str(tmp_path), True)
    files.write()
    assert files.path == tmp_path / "model" / "imported" / "start.yaml"
    found = composed(files.command("runs/it's a start"))
    assert (found.model, found.layout, found.schedule) == (MODEL, LAYOUT, RUN.schedule)
    assert (found.data.tokenizer, found.data.end_token, found.train) == (RUN.data.tokenizer, "<|im_end|>", RUN.train)
    assert (found.checkpoint.resume, found.run_dir) == ("runs/it's a start", "runs/start-trained")
    assert found.data.path == "runs/data/start"
    assert shlex.split(files.data_command or "")[1:] == [
        "launch/prepare_data.py",
        "input=bundled",
        "output=runs/data/start",
        "tokenizer=/a folder/tokenizer.json",
        'end_token="<|im_end|>"',
    ]


def test_data_for_an_import_are_prepared_with_its_end_token(tmp_path: Path) -> None:
    files = ModelFiles(replace(RUN, data=replace(RUN.data, end_token="<eos>")), str(tmp_path), True)
    assert shlex.split(files.data_command or "")[-1] == 'end_token="<eos>"'


def test_an_import_of_bytes_trains_on_the_bundled_corpus(tmp_path: Path) -> None:
    files = ModelFiles(replace(RUN, data=DataConfig()), str(tmp_path), True)
    files.write()
    assert files.data_command is None
    assert composed(files.command("start")).data.path == "bundled"
    assert composed(files.command("start"), "optim.lr=1e-6").optim.lowest_lr < 1e-6


def test_another_layout_on_the_command_line_takes_the_place_of_the_models(tmp_path: Path) -> None:
    files = ModelFiles(RUN, str(tmp_path), True)
    files.write()
    found = composed(files.command("start"), "layout=s2_b64_l16_v16", "schedule=strided")
    named = OmegaConf.load(CONF / "layout" / "s2_b64_l16_v16.yaml")
    assert found.layout == OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LayoutConfig), named))
    assert found.schedule == ScheduleConfig("strided")


def test_without_a_layout_of_its_own_the_command_line_chooses(tmp_path: Path) -> None:
    files = ModelFiles(RUN, str(tmp_path), False)
    files.write()
    found = composed(files.command("start"))
    assert (found.layout.layers, found.schedule) == ("D", ScheduleConfig())


def test_settings_of_an_earlier_import_are_kept(tmp_path: Path) -> None:
    ModelFiles(RUN, str(tmp_path), True).write()
    ModelFiles(RUN, str(tmp_path), True).write()
    with pytest.raises(ConfigError, match=r"output=start: .*start\.yaml has other settings"):
        ModelFiles(replace(RUN, model=replace(MODEL, vocab_size=288)), str(tmp_path), True)


def test_imported_models_are_among_those_that_an_error_lists(tmp_path: Path) -> None:
    ModelFiles(RUN, str(tmp_path), True).write()
    assert config_groups(tmp_path) == {group: ["imported/start"] for group in ("model", "layout", "schedule")}


@pytest.mark.parametrize(
    ("path", "name"), [("runs/llama", "llama"), ("runs/Llama-3.2 (1B)/", "Llama-3.2-1B"), ("ü", "model")]
)
def test_a_models_name_needs_no_quotes(path: str, name: str) -> None:
    assert model_name(Path(path)) == name


def test_files_of_masks_go_with_the_settings(tmp_path: Path) -> None:
    (tmp_path / "mine.npz").write_bytes(b"masks")
    pattern = PatternConfig(kind="file", file=str(tmp_path / "mine.npz"))
    (tmp_path / "export").mkdir()
    saved = settings_json(replace(RUN, layout=replace(LAYOUT, pattern=pattern)), tmp_path / "export", True)
    assert (tmp_path / "export" / saved["layout"]["pattern"]["file"]).read_bytes() == b"masks"
    layout, schedule = read_settings(saved, tmp_path / "export", tmp_path / "run")
    assert layout == replace(LAYOUT, pattern=replace(pattern, file=str(tmp_path / "run" / "masks-0.npz")))
    assert schedule == RUN.schedule


@pytest.mark.parametrize(
    ("entry", "value", "shown"),
    [
        ((), None, "s2train=null, not settings by name"),
        (("layout",), 3, "s2train.layout=3, not settings by name"),
        (("schedule",), [], "s2train.schedule=[], not settings by name"),
        (("tokenizer",), "gpt2", "s2train.tokenizer=gpt2, not bytes or tokenizer.json"),
        (("tokenizer",), {}, "s2train.tokenizer={}, not bytes or tokenizer.json"),
        (("end_token",), 256, "s2train.end_token=256, not the name of a token"),
        (("schedule", "kind"), [1], "s2train.schedule.kind=[1], Cannot convert"),
        (("layout", "layer"), "D", "s2train.layout.layer=D, Key 'layer' not in"),
        (("layout", "patterns"), [], "s2train.layout={"),
        (("layout", "pattern"), "x", "s2train.layout={"),
        (("layout", "pattern", "local"), "x", "s2train.layout.pattern.local=x, Value 'x'"),
        (("layout", "pattern", "file"), "masks-0.npz", "s2train.layout: file=masks-0.npz, no file of the export"),
        (("layout", "pattern", "file"), "../config.json", "s2train.layout: file=../config.json, no file of the export"),
        (("layout", "pattern", "file"), [1], "s2train.layout: file=[1], no file of the export"),
    ],
)
def test_a_damaged_entry_is_named_with_its_file_and_the_remedy(
    tmp_path: Path, entry: tuple[str, ...], value: object, shown: str
) -> None:
    saved = settings_json(RUN, tmp_path, True)
    (tmp_path / "export").mkdir()
    (tmp_path / "config.json").touch()
    whole: dict[str, Any] = {"s2train": saved}
    *above, last = ("s2train", *entry)
    section = whole
    for name in above:
        section = section[name]
    section[last] = value
    with pytest.raises(ConfigError) as rejected:
        read_settings(whole["s2train"], tmp_path / "export", tmp_path / "run")
    text = str(rejected.value)
    assert text.startswith(f"weights={tmp_path / 'export'}: config.json has {shown}"), text
    assert text.endswith("Export the run again with this version (launch/export.py)")


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_weights_have_the_mode_that_the_umask_asks_for(tmp_path: Path, mask: int) -> None:
    import torch

    before = os.umask(mask)
    try:
        write_weights(tmp_path, {"x": torch.ones(3)})
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask
