"""A job of a sweep runs the right command in the right environment."""

import re
import subprocess
from pathlib import Path

import pytest

from s2train.config import LocalSweepConfig, SlurmSweepConfig
from s2train.errors import ConfigError
from s2train.sweeps.commands import batch_script, environment
from s2train.sweeps.gpus import divide_gpus
from tests.program import ROOT

TORCHRUN_VARIABLES = {
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
    """Write a program that prints its arguments, its environment and its folder."""
    path.write_text('#!/bin/bash\nprintf "%s\\n" "$@"; env; pwd\n')
    path.chmod(0o755)


def test_a_job_inherits_no_torchrun_variables() -> None:
    kept = {"PATH": "/bin", "MASTERY": "kept", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert environment(TORCHRUN_VARIABLES | kept, None) == kept
    assert environment({"HYDRA_FULL_ERROR": "1"} | kept, None) == kept  # its errors are one line each
    assert environment(TORCHRUN_VARIABLES | kept, ["3", "5"]) == kept | {"CUDA_VISIBLE_DEVICES": "3,5"}


def test_concurrent_jobs_share_no_gpu() -> None:
    gpus = ["0", "2", "4", "6", "7"]
    assert divide_gpus(LocalSweepConfig(n_jobs=2, nproc_per_node=2), gpus) == [["0", "2"], ["4", "6"]]
    assert divide_gpus(LocalSweepConfig(n_jobs=3, nproc_per_node=2, split_gpus=False), gpus) == [None] * 3
    assert divide_gpus(LocalSweepConfig(n_jobs=3), []) == [None] * 3


def test_more_jobs_than_gpus_are_rejected() -> None:
    with pytest.raises(ConfigError, match=r"n_jobs=3: .* needs 6 GPUs, but 5 are visible. Set it to 2"):
        divide_gpus(LocalSweepConfig(n_jobs=3, nproc_per_node=2), list("01234"))


def test_a_batch_script_requests_what_a_job_needs(tmp_path: Path) -> None:
    text = script(tmp_path / "50% a", nproc_per_node=8, options={"cpus_per_task": 4, "open-mode": None, "mem": "9 G"})
    for line in ("nodes=1", "gpus-per-node=8", "cpus-per-task=4", "mem='9 G'", f"output='{tmp_path}/50%% a/log.txt'"):
        assert f"#SBATCH --{line}\n" in text
    assert "open-mode" not in text


def test_a_true_option_is_a_flag_and_a_false_one_is_omitted(tmp_path: Path) -> None:
    text = script(tmp_path, options={"exclusive": True, "contiguous": False})
    assert "#SBATCH --exclusive\n" in text
    assert "contiguous" not in text


def test_a_job_may_be_requeued_by_default(tmp_path: Path) -> None:
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
        ["bash"],
        input=shown,
        text=True,
        capture_output=True,
        env=TORCHRUN_VARIABLES | {"PATH": f"{tmp_path}:/bin:/usr/bin"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[lines.index("pretrain.py") + 1 :][:3] == arguments
    assert not [line for line in lines if line.split("=")[0] in TORCHRUN_VARIABLES]
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


def test_several_nodes_start_like_a_pretraining(tmp_path: Path) -> None:
    made, program = SlurmSweepConfig(nodes=3, nproc_per_node=8), Path("/code/launch/pretrain.py")
    text = batch_script(made, "job", tmp_path, tmp_path, "my python", program, ["run_dir='a b'"])
    start = f"PYTHON='my python' LOG_DIR={tmp_path}/logs NPROC_PER_NODE=8 exec /code/launch/slurm/run.sh"
    assert f"{start} /code/launch/pretrain.py " in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
