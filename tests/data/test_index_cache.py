"""Cached indices that a kill or a full disk left incomplete are rebuilt."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from s2train.config import PretrainConfig
from s2train.data.datasets import build_datasets
from s2train.data.index_cache import remove_broken_sets
from s2train.data.tokenizers import ByteTokenizer

MakeConfig = Callable[..., PretrainConfig]

DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut in its header": lambda path: os.truncate(path, 50),
    "emptied": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "removed": Path.unlink,
}


def samples(cfg: PretrainConfig) -> torch.Tensor:
    """Training and held-out samples of a run."""
    train, valid = build_datasets(cfg, ByteTokenizer(), 40, 5)
    parts: list[tuple[Any, int]] = [(train, 40), (valid, 5)]
    return torch.cat([torch.stack([part[i]["tokens"] for i in range(number)]) for part, number in parts])


def files(cfg: PretrainConfig) -> list[Path]:
    return sorted(path for path in Path(cfg.data.cache).rglob("*-*") if path.is_file())


def check_every_file(cfg: PretrainConfig, number: int, how: str) -> None:
    expected = samples(cfg)
    there = files(cfg)
    assert len(there) == number
    for path in there:
        content = path.read_bytes()
        DAMAGES[how](path)
        assert torch.equal(samples(cfg), expected), path
        assert files(cfg) == there
        assert path.read_bytes() == content or path.suffix == ".txt"


@pytest.mark.parametrize("how", DAMAGES)
def test_any_broken_index_of_a_dataset_is_rebuilt(corpus: str, config: MakeConfig, how: str) -> None:
    check_every_file(config(corpus), 2 * 4, how)


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("how", DAMAGES)
def test_any_broken_index_of_a_blend_is_rebuilt(corpus: str, config: MakeConfig, tmp_path: Path, how: str) -> None:
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"other{suffix}").write_bytes(Path(corpus + suffix).read_bytes())
    check_every_file(config([0.7, corpus, 0.3, str(tmp_path / "other")]), 2 * (4 + 4 + 3), how)


def test_a_broken_index_of_mock_data_is_rebuilt(config: MakeConfig) -> None:
    check_every_file(config("mock"), 2 * 4, "cut")


def test_rebuilding_an_index_prints_one_line(
    corpus: str, config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(corpus)
    samples(cfg)
    broken = next(path for path in files(cfg) if path.suffix == ".npy")
    DAMAGES["cut"](broken)
    capsys.readouterr()
    samples(cfg)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "rebuilding" in line]
    assert broken.name.rpartition("-")[0] in line


def test_a_run_that_has_a_broken_index_open_keeps_reading_it(corpus: str, config: MakeConfig) -> None:
    cfg = config(corpus)
    samples(cfg)
    index = next(path for path in files(cfg) if path.name.endswith("train-sample_index.npy"))
    content = index.read_bytes()
    with index.open("rb") as held:
        index.with_name(index.name.replace("sample_index.npy", "description.txt")).unlink()
        samples(cfg)
        assert not os.path.samestat(os.fstat(held.fileno()), index.stat())  # a new file, not overwritten in place
        assert held.read() == content


def test_complete_indices_and_other_files_stay(corpus: str, config: MakeConfig) -> None:
    cfg = config(corpus)
    samples(cfg)
    folder = files(cfg)[0].parent
    (folder / "mine-and-not-Megatron's-index.npy").touch()
    before = {path: path.stat().st_ino for path in folder.iterdir()}
    assert remove_broken_sets(folder) == []
    assert {path: path.stat().st_ino for path in folder.iterdir()} == before
