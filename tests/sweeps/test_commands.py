"""What a job of a sweep runs."""

import subprocess
from pathlib import Path

import pytest

from s2train.config import LocalSweepConfig, SlurmSweepConfig
from s2train.errors import ConfigError
from s2train.sweeps.commands import batch_script, environment, torchrun
from s2train.sweeps.gpus import shares

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


def test_a_batch_script_passes_arguments_unchanged_and_no_ranks_variables(tmp_path: Path) -> None:
    arguments = ["run_dir='a b'", "x=$HOME", 'y="z"']
    text = script(tmp_path, *arguments, setup=["export SET_UP=yes"])
    shown = text.replace("exec slurm/run.sh", "exec show")
    show = tmp_path / "show"
    show.write_text('#!/bin/bash\nprintf "%s\\n" "$@"; env; pwd\n')
    show.chmod(0o755)
    done = subprocess.run(
        ["bash"], input=shown, text=True, capture_output=True, env=OF_RANKS | {"PATH": f"{tmp_path}:/bin:/usr/bin"}
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[lines.index("pretrain.py") + 1 :][:3] == arguments
    assert not [line for line in lines if line.split("=")[0] in OF_RANKS]
    assert "SET_UP=yes" in lines
    assert lines[-1] == str(tmp_path)


@pytest.mark.parametrize("nodes", [1, 3])
def test_a_job_starts_as_a_pretraining_of_its_own_does(tmp_path: Path, nodes: int) -> None:
    made = SlurmSweepConfig(nodes=nodes, nproc_per_node=8)
    program = Path("/code/launch/pretrain.py")
    text = batch_script(made, "job", tmp_path, tmp_path, "python", program, ["run_dir='a b'"])
    assert "NPROC_PER_NODE=8 exec /code/launch/slurm/run.sh /code/launch/pretrain.py" in text
    assert "#SBATCH --signal=B:USR1@300\n" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
