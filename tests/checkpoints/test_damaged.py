"""A damaged checkpoint is reported with a remedy that works, and nothing saved is lost."""

import itertools
import os
import pickletools
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from s2train.checkpoints.integrity import damage
from s2train.checkpoints.listing import checkpoints_in
from tests.program import error_line, metrics, pretrain, run

pytestmark = [pytest.mark.slow]

STEPS = "train.steps=6"
# Files of megatron-core 0.16; 0.19 writes no common.pt, and one shard fewer.
FILES = [".metadata", "__0_0.distcp", "__0_1.distcp", "common.pt", "config.yaml", "metadata.json", "progress.json"]
DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "removed": Path.unlink,
}
# The index, and a shard. Tests below damage the other files.
ONE_DAMAGE_EACH = [(".metadata", "cut"), ("__0_0.distcp", "emptied")]
OTHERS = [of for of in itertools.product(FILES, DAMAGES) if of not in ONE_DAMAGE_EACH]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped at step 5 of 6, with the checkpoints of steps 4 and 5."""
    folder = tmp_path_factory.mktemp("stopped")
    pretrain(folder, STEPS, "train.exit_step=5", "checkpoint.interval=1", "checkpoint.keep=2", processes=0).succeeded()
    assert {path.name for path in last_of(folder).iterdir()} <= set(FILES)
    return folder


@pytest.fixture
def run_dir(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def last_of(run_dir: Path) -> Path:
    return checkpoints_in(run_dir / "checkpoints")[-1]


def remedy(line: str) -> str:
    """The setting that the error's last sentence recommends."""
    (found,) = re.findall(r"checkpoint\.resume=\S+", line.rpartition(". ")[2])
    return str(found)


def folders(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir())


def test_any_damage_to_any_file_is_detected_and_the_file_named(run_dir: Path, tmp_path: Path) -> None:
    last = last_of(run_dir)
    for number, (path, how) in enumerate(itertools.product(sorted(last.iterdir()), DAMAGES)):
        copy = Path(shutil.copytree(last, tmp_path / str(number)))
        DAMAGES[how](copy / path.name)
        assert path.name in (damage(copy) or "nothing")


@pytest.mark.parametrize(
    ("name", "how"), [*ONE_DAMAGE_EACH, *(pytest.param(*of, marks=pytest.mark.long) for of in OTHERS)]
)
def test_whichever_file_is_damaged_the_remedy_resumes_training(run_dir: Path, name: str, how: str) -> None:
    last = last_of(run_dir)
    if not (last / name).exists():
        pytest.skip("this megatron-core writes no such file")
    DAMAGES[how](last / name)
    rejected = pretrain(run_dir, STEPS, processes=0)
    assert rejected.status != 0
    line = error_line(rejected)
    assert line.startswith(f"error: checkpoint.resume={last}: its ")
    assert name in line
    assert remedy(line) == f"checkpoint.resume={run_dir}/checkpoints/iter_0000004"
    done = pretrain(run_dir, STEPS, remedy(line), processes=0).succeeded()
    assert [line for line in done.out.splitlines() if line.startswith(f"{last}: its ")]
    assert metrics(run_dir)[-1]["step"] == 6
    assert folders(run_dir) == ["damaged_iter_0000005", "iter_0000004", "iter_0000006"]


def test_a_program_that_only_reads_weights_names_the_shard_that_is_cut(run_dir: Path, tmp_path: Path) -> None:
    DAMAGES["cut"](last_of(run_dir) / "__0_0.distcp")
    line = error_line(run("export.py", f"checkpoint={run_dir}", f"output={tmp_path / 'out'}", processes=0))
    assert line.startswith(f"error: checkpoint={last_of(run_dir)}: its shard __0_0.distcp is cut short")
    assert line.endswith(f"checkpoint={run_dir}/checkpoints/iter_0000004")


def test_if_the_only_checkpoint_is_damaged_the_remedy_starts_from_step_1(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints" / "iter_0000004")
    DAMAGES[random.choice(list(DAMAGES))](random.choice(sorted(last_of(run_dir).iterdir())))
    line = error_line(pretrain(run_dir, STEPS, processes=0))
    assert "another run_dir" in line
    assert remedy(line) == "checkpoint.resume=never"
    pretrain(run_dir, STEPS, remedy(line), processes=0).succeeded()
    assert folders(run_dir) == ["damaged_iter_0000005", "iter_0000006"]


def zero(shard: Path) -> None:
    """Overwrite a file with zeros of the same length, as after a power failure."""
    shard.write_bytes(bytes(shard.stat().st_size))


@pytest.mark.parametrize("processes", [pytest.param(0, marks=pytest.mark.long), 2])
def test_a_run_may_start_before_a_checkpoint_that_failed_to_load(run_dir: Path, processes: int) -> None:
    last, older = last_of(run_dir), f"checkpoint.resume={run_dir}/checkpoints/iter_0000004"
    before = error_line(pretrain(run_dir, STEPS, older, processes=0))
    assert "checkpoint.resume=auto" in before  # no problem of the last one is known yet
    zero(max(last.glob("*.distcp")))
    line = error_line(pretrain(run_dir, STEPS, processes=processes))
    assert line.startswith(f"error: checkpoint.resume={last}: its shards can't be loaded")
    assert remedy(line) == older
    pretrain(run_dir, STEPS, older, processes=processes).succeeded()
    assert folders(run_dir) == ["damaged_iter_0000005", "iter_0000004", "iter_0000006"]


def test_a_checkpoint_that_loads_again_counts_as_intact(run_dir: Path) -> None:
    last = last_of(run_dir)
    shard = last / "__0_0.distcp"
    content = shard.read_bytes()
    zero(shard)
    older = remedy(error_line(pretrain(run_dir, STEPS, processes=0)))
    shard.write_bytes(content)
    assert pretrain(run_dir, STEPS, "train.exit_step=6", "checkpoint.save=false", processes=0).status == 0
    assert "iter_0000005" in error_line(pretrain(run_dir, STEPS, older, processes=0))
    assert last.is_dir()


def test_the_remedy_works_again_if_the_next_checkpoint_is_damaged_too(run_dir: Path) -> None:
    (last_of(run_dir) / "config.yaml").unlink()
    older = remedy(error_line(pretrain(run_dir, STEPS, processes=0)))
    assert pretrain(run_dir, STEPS, older, "train.exit_step=5", processes=0).status == 0
    (last_of(run_dir) / "metadata.json").unlink()
    pretrain(run_dir, STEPS, older, processes=0).succeeded()
    assert folders(run_dir) == ["damaged_iter_0000005", "damaged_iter_0000005.1", "iter_0000004", "iter_0000006"]


def test_a_restarted_branch_does_not_start_over_if_its_checkpoint_is_damaged(stopped: Path, tmp_path: Path) -> None:
    branch = [STEPS, f"checkpoint.resume={stopped}/checkpoints/iter_0000004"]
    assert pretrain(tmp_path, *branch, "train.exit_step=5", processes=0).status == 0
    (last_of(tmp_path) / "progress.json").unlink()
    line = error_line(pretrain(tmp_path, *branch, processes=0))
    assert "progress.json is missing" in line
    assert folders(tmp_path) == ["iter_0000005"]


@pytest.mark.parametrize(("name", "problem"), [("common_state/shard_0_1", None), ("rng", "its common.pt is missing")])
def test_the_common_state_is_in_the_shards_or_in_a_separate_file(
    run_dir: Path, tmp_path: Path, name: str, problem: str | None
) -> None:
    folder = tmp_path / "iter_0000001"
    torch.distributed.checkpoint.save({name: torch.ones(3)}, checkpoint_id=folder, no_dist=True)
    for file in ("config.yaml", "metadata.json", "progress.json"):
        shutil.copy(last_of(run_dir) / file, folder)
    assert damage(folder) == problem


def test_a_flipped_bit_in_the_index_raises_nothing(run_dir: Path) -> None:
    index = last_of(run_dir) / ".metadata"
    content = bytearray(index.read_bytes())
    for _ in range(60):  # most of them in names and numbers
        flipped = content.copy()
        flipped[random.randrange(len(content))] ^= 1 << random.randrange(8)
        index.write_bytes(flipped)
        damage(last_of(run_dir))  # raises nothing


def test_a_flipped_bit_that_would_allocate_gigabytes_is_detected_first(run_dir: Path) -> None:
    index = last_of(run_dir) / ".metadata"
    content = bytearray(index.read_bytes())
    place = next(place for operation, _, place in pickletools.genops(bytes(content)) if operation.name == "BUILD")
    content[place] ^= 1 << 4  # now LONG_BINPUT, whose index is the next four bytes
    content[place + 1 : place + 5] = (1 << 26).to_bytes(4, "little")
    index.write_bytes(content)
    assert damage(last_of(run_dir)) == "its index .metadata can't be read (ValueError)"
