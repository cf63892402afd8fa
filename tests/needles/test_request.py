"""A needle evaluation rejects bad settings before it uses a device."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from s2train.config import LayoutConfig, ModelConfig, PatternConfig, PretrainConfig, TrainConfig
from s2train.data.tokenizers import train_bpe
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.layouts.patterns.file import write_masks
from s2train.needles.config import NeedleConfig
from s2train.needles.request import Request, read_request

CPU, GPU = Hardware("CPU", "cpu", 1 << 30), Hardware("GPU", "cuda", 1 << 30)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint with the settings of a run on bytes and no weights."""
    return save(tmp_path / "run")


def save(run: Path, tokenizer: str = "bytes", layout: LayoutConfig | None = None) -> Path:
    model = ModelConfig("tiny", 2, 64, 96, 4, 2, vocab_size=272)
    trained = PretrainConfig(model=model, layout=layout or LayoutConfig(layers="D"), train=TrainConfig(1, 512, 1))
    trained.data.tokenizer = tokenizer
    folder = run / "checkpoints" / "iter_0000001"
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.structured(trained), folder / "config.yaml")
    return run


def save_masked(run: Path) -> Path:
    """A run of 512 tokens whose layout's file holds masks of 128."""
    masks = np.tri(2, dtype=bool)[None].repeat(4, 0)
    write_masks(run.with_suffix(".npz"), {0: masks, 1: masks}, 64)
    return save(run, layout=LayoutConfig("S", 64, PatternConfig("file", file=str(run.with_suffix(".npz")))))


def read(checkpoint: Path, world_size: int = 1, hardware: Hardware = CPU, **settings: Any) -> Request:
    return read_request(NeedleConfig(checkpoint=str(checkpoint), **settings), world_size, hardware)


BAD: list[tuple[str, Any]] = [
    ("extra_tokens", -1),
    ("lengths", [10**12]),  # more blocks than a layout is built for
    ("attention_backend", "foo"),
    ("attention_backend", "triton"),
    ("haystack", 5),
    ("haystack", []),
    ("haystack", ["noise", 5]),
    ("haystack", ""),
    ("haystack", "missing.txt"),
    ("output", ""),
    ("haystack", "."),
    ("lengths", []),
    ("lengths", [60]),
    ("lengths", [-1]),
    ("lengths", [256, 256]),
    ("task", "keyvalue"),
    ("task", []),
    ("task", 5),
    ("task", [["single"]]),
    ("task", ["single", "single"]),
    ("needles", 2),
    ("ask", "one"),
    ("distractors", 5),
    ("hops", 2),
    ("chains", 2),
    ("threshold", 0.0),
    ("threshold", 1.5),
    ("wandb", "of"),
    ("depths", []),
    ("depths", [1.5]),
    ("depths", [float("nan")]),
    ("trials", 0),
    ("batch_size", 0),
    ("batch_tokens", 0),
    ("seed", -1),
    ("tp", 0),
    ("tp", 2),
    ("tokenizer", "missing.json"),
]


@pytest.mark.parametrize(("setting", "value"), BAD, ids=str)
def test_a_setting_that_cannot_work_is_rejected(checkpoint: Path, setting: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        read(checkpoint, **{setting: value})
    assert error.value.setting == setting
    assert "\n" not in str(error.value)
    assert not torch.distributed.is_initialized()
    assert not (checkpoint / "needle").exists()


def test_an_output_that_cannot_be_written_is_rejected(checkpoint: Path) -> None:
    file = checkpoint / "file"
    file.touch()
    for output in (file, file / "folder"):
        with pytest.raises(ConfigError, match="output"):
            read(checkpoint, output=str(output))
    assert read(checkpoint, output=str(checkpoint / "new" / "folder")).folder == checkpoint / "new" / "folder"
    assert not (checkpoint / "new").exists()


def test_an_unknown_task_is_rejected_with_the_nearest(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"task=variable-tracking: no such task. Did you mean variable_tracking\?"):
        read(checkpoint, task="variable-tracking")


def test_a_setting_must_belong_to_a_requested_task(checkpoint: Path) -> None:
    read(checkpoint, task=["single", "multi"], needles=2, lengths=[512])
    with pytest.raises(
        ConfigError, match=r"needles=2: task=single has no such setting\. Leave it unset, or set task=multi"
    ):
        read(checkpoint, needles=2)


def test_each_task_has_the_lengths_that_it_fits(checkpoint: Path) -> None:
    problems = read(checkpoint, task=["single", "multi"]).problems
    assert [(problem.name, problem.grid.lengths) for problem in problems] == [
        ("single", (128, 256, 384, 512)),
        ("multi", (256, 384, 512)),
    ]


def test_needles_longer_than_a_length_are_rejected_with_both_remedies(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"lengths=128: needles, .* Use \d+ or more, or fewer needles"):
        read(checkpoint, task="multi", lengths=[512, 128])
    with pytest.raises(ConfigError, match=r"lengths=512: .* or fewer distractors"):
        read(checkpoint, task="key_value", distractors=30, lengths=[512])


def test_a_length_beyond_the_trained_one_is_accepted(checkpoint: Path) -> None:
    assert read(checkpoint, lengths=[4096]).problems[0].grid.lengths == (4096,)


def test_a_length_beyond_the_layouts_masks_is_rejected(tmp_path: Path) -> None:
    write_masks(tmp_path / "masks.npz", {0: np.tri(8, dtype=bool)[None].repeat(4, 0)}, 64)
    layout = LayoutConfig("SD", pattern=PatternConfig(kind="file", file=str(tmp_path / "masks.npz")))
    run = save(tmp_path / "run", layout=layout)
    assert read(run, lengths=[512], extra_tokens=0)
    assert read(run, lengths=[508], extra_tokens=4)
    with pytest.raises(ConfigError, match=r"lengths=513: the checkpoint's layout is shorter .* 8 blocks"):
        read(run, lengths=[128, 513], extra_tokens=0)
    with pytest.raises(ConfigError, match=r"lengths=512: .* Use shorter lengths, or extra_tokens=0"):
        read(run, lengths=[512])


def test_a_layout_whose_file_was_moved_is_not_blamed_on_the_lengths(tmp_path: Path) -> None:
    layout = LayoutConfig("SD", pattern=PatternConfig(kind="file", file=str(tmp_path / "moved.npz")))
    run = save(tmp_path / "run", layout=layout)
    with pytest.raises(
        ConfigError, match=r"^checkpoint=.*the layout in its config\.yaml .*moved\.npz: there is no such"
    ):
        read(run, lengths=[512])


def test_a_checkpoint_without_its_layout_is_rejected(checkpoint: Path) -> None:
    (folder,) = (checkpoint / "checkpoints").iterdir()
    settings = folder / "config.yaml"
    whole = settings.read_text()
    for broken in (whole.replace("layers: D", "layers: null"), whole.replace("layout:", "leyout:"), "layout: [", ""):
        settings.write_text(broken)
        with pytest.raises(ConfigError, match=r"its config\.yaml has no layout"):
            read(checkpoint)
    settings.unlink()
    for where in (checkpoint, checkpoint / "checkpoints", folder):
        with pytest.raises(ConfigError, match=r"iter_0000001 has no config\.yaml, which describes its layout"):
            read(where)


def test_heads_that_tp_does_not_divide_are_rejected(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"tp=3: doesn't divide model\.num_attention_heads=4"):
        read(checkpoint, world_size=3, tp=3)
    assert read(checkpoint, world_size=4, tp=2)


def test_more_ranks_than_kv_heads_are_accepted(checkpoint: Path) -> None:
    assert read(checkpoint, world_size=4, tp=4).trained.model.num_query_groups == 2


def test_triton_is_accepted_on_a_gpu(checkpoint: Path) -> None:
    assert read(checkpoint, hardware=GPU, attention_backend="triton")


def test_a_missing_checkpoint_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="checkpoint="):
        read(tmp_path)


def test_haystacks_are_files_or_noise(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("A sentence of the file. Another one.")
    for haystack in (str(file), [str(file), str(file)], "noise"):
        assert read(checkpoint, haystack=haystack).problems[0].grid.lengths == (128, 256, 384, 512)


def test_a_haystack_without_words_is_rejected(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ConfigError, match=r"haystack.*empty\.txt.*holds no text"):
        read(checkpoint, haystack=[str(tmp_path / "empty.txt")])


def test_a_moved_tokenizer_must_be_set(tmp_path: Path) -> None:
    train_bpe(["text of a tokenizer " * 20], 270, tmp_path / "there.json")
    run = save(tmp_path / "run", tokenizer=str(tmp_path / "here.json"))
    with pytest.raises(ConfigError, match=r"tokenizer=.*here\.json"):
        read(run)
    assert read(run, tokenizer=str(tmp_path / "there.json")).problems[0].sampler.tokenizer.name == str(
        tmp_path / "there.json"
    )


def test_a_tokenizer_larger_than_the_models_vocabulary_is_rejected(checkpoint: Path, tmp_path: Path) -> None:
    train_bpe(["every word differs from all others in many pairs of letters " * 20], 300, tmp_path / "large.json")
    with pytest.raises(ConfigError, match="the model has 272"):
        read(checkpoint, tokenizer=str(tmp_path / "large.json"))
