"""What a job of a sweep runs."""

import re
import subprocess
from pathlib import Path

import pytest

from s2train.config import LocalSweepConfig, SlurmSweepConfig
from s2train.errors import ConfigError
from s2train.sweeps.commands import batch_script, environment, torchrun
from s2train.sweeps.gpus import shares
from tests.program import ROOT

OF_RANKS = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "here",
    "MASTER_PORT": "1",
    "TORCHELASTIC_RUN_ID": "x",
    "PET_NNODES": "2",
    "ROLE_RANK": "1",
}


def script(folder: Path, *arguments: str, **settings: object) -> str:
    made = SlurmSweepConfig(**settings)  # type: ignore[arg-type]
    return batch_script(made, "job", folder, folder, "python", Path("pretrain.py"), arguments)


def write_show(path: Path) -> None:
    """A program that prints its arguments, its environment and its folder."""
    path.write_text('#!/bin/bash\nprintf "%s\\n" "$@"; env; pwd\n')
    path.chmod(0o755)


def test_a_job_has_a_torchrun_and_a_port_of_its_own() -> None:
    command = " ".join(torchrun("python", 2, Path("launch/pretrain.py"), ["seed=1"]))
    assert command == "python -m torch.distributed.run --standalone --nproc-per-node 2 launch/pretrain.py seed=1"


def test_a_job_is_told_nothing_of_the_ranks_around_it() -> None:
    kept = {"PATH": "/bin", "MASTERY": "kept", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert environment(OF_RANKS | kept, None) == kept
    assert environment({"HYDRA_FULL_ERROR": "1"} | kept, None) == kept  # its errors are one line each
    assert environment(OF_RANKS | kept, ["3", "5"]) == kept | {"CUDA_VISIBLE_DEVICES": "3,5"}


def test_jobs_at_work_together_share_no_gpu() -> None:
    gpus = ["0", "2", "4", "6", "7"]
    assert shares(LocalSweepConfig(n_jobs=2, nproc_per_node=2), gpus) == [["0", "2"], ["4", "6"]]
    assert shares(LocalSweepConfig(n_jobs=3, nproc_per_node=2, split_gpus=False), gpus) == [None] * 3
    assert shares(LocalSweepConfig(n_jobs=3), []) == [None] * 3


def test_more_jobs_than_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"n_jobs=3: .* takes 6 GPUs, and this machine shows 5. Set it to 2"):
        shares(LocalSweepConfig(n_jobs=3, nproc_per_node=2), list("01234"))


def test_a_batch_script_asks_for_what_a_job_needs(tmp_path: Path) -> None:
    text = script(tmp_path / "50% a", nproc_per_node=8, options={"cpus_per_task": 4, "open-mode": None, "mem": "9 G"})
    for line in ("nodes=1", "gpus-per-node=8", "cpus-per-task=4", "mem='9 G'", f"output='{tmp_path}/50%% a/log.txt'"):
        assert f"#SBATCH --{line}\n" in text
    assert "open-mode" not in text


def test_an_option_that_is_true_is_a_bare_name_and_one_that_is_false_is_left_out(tmp_path: Path) -> None:
    text = script(tmp_path, options={"exclusive": True, "contiguous": False})
    assert "#SBATCH --exclusive\n" in text
    assert "contiguous" not in text


def test_a_job_may_be_queued_again_unless_told_otherwise(tmp_path: Path) -> None:
    assert "#SBATCH --requeue\n" in script(tmp_path)
    assert "#SBATCH --signal=B:USR1@300\n" in script(tmp_path)
    assert "#SBATCH --requeue" not in script(tmp_path, options={"requeue": False})


@pytest.mark.parametrize("nodes", [1, 3])
def test_a_batch_script_passes_arguments_unchanged_and_no_ranks_variables(tmp_path: Path, nodes: int) -> None:
    arguments = ["run_dir='a b'", "x=$HOME", 'y="z"']
    text = script(tmp_path, *arguments, nodes=nodes, setup=["export SET_UP=yes"])
    shown = re.sub(r"exec slurm/\w+\.sh", "exec show", text)
    write_show(tmp_path / "show")
    done = subprocess.run(
        ["bash"], input=shown, text=True, capture_output=True, env=OF_RANKS | {"PATH": f"{tmp_path}:/bin:/usr/bin"}
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[lines.index("pretrain.py") + 1 :][:3] == arguments
    assert not [line for line in lines if line.split("=")[0] in OF_RANKS]
    assert "SET_UP=yes" in lines
    assert lines[-1] == str(tmp_path)


def test_one_node_starts_its_ranks_in_the_batch_step(tmp_path: Path) -> None:
    made, python = SlurmSweepConfig(nproc_per_node=8), tmp_path / "my python"
    write_show(python)
    program = ROOT / "launch" / "pretrain.py"
    text = batch_script(made, "job", tmp_path, tmp_path, str(python), program, ["run_dir='a b'"])
    done = subprocess.run(["bash"], input=text, text=True, capture_output=True, env={"PATH": "/bin:/usr/bin"})
    assert done.returncode == 0, done.stderr
    launcher = [str(ROOT / "launch" / "job.py"), "--standalone", "--nproc-per-node", "8"]
    assert done.stdout.splitlines()[:6] == [*launcher, str(program), "run_dir='a b'"]


def test_several_nodes_start_as_a_pretraining_of_its_own_does(tmp_path: Path) -> None:
    made, program = SlurmSweepConfig(nodes=3, nproc_per_node=8), Path("/code/launch/pretrain.py")
    text = batch_script(made, "job", tmp_path, tmp_path, "my python", program, ["run_dir='a b'"])
    start = f"PYTHON='my python' LOG_DIR={tmp_path}/logs NPROC_PER_NODE=8 exec /code/launch/slurm/run.sh"
    assert f"{start} /code/launch/pretrain.py " in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
