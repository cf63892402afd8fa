"""What programs import before they need it: on some file systems each module takes milliseconds to find and read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Of packages that may be installed beside, too: pulled in by another one, they would be noticed by their seconds only.
NEVER = {"wandb", "networkx", "scipy", "pandas", "pyarrow", "transformers", "datasets", "IPython", "matplotlib", "rich"}
NEVER |= {"torch._inductor.compile_fx", "torch._inductor.select_algorithm", "torch._functorch.aot_autograd"}
BEFORE_THE_PLAN = NEVER | {"megatron", "sympy", "setuptools", "triton", "tokenizers", "torch._dynamo"}

PROGRAM = f"""
import gc, json, sys
sys.path.insert(0, {str(ROOT / "launch")!r})
stages = []
import job
stages.append(sorted(sys.modules))
import pretrain
stages.append(sorted(sys.modules))
import torch
compile_at_once = torch.compile
from s2train.megatron import lazy_imports
lazy_imports.import_megatron()
import s2train.training.run
stages.append(sorted(sys.modules))
assert torch.compile is compile_at_once and gc.isenabled()
import wandb
print(json.dumps(stages))
"""


@pytest.fixture(scope="module")
def stages() -> list[set[str]]:
    """Modules of launch/job.py; of launch/pretrain.py where it composes; of a run, with all that it imports."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("COVERAGE_PROCESS_START", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [set(modules) for modules in json.loads(done.stdout.splitlines()[-1])]


def test_the_launcher_imports_torch_alone(stages: list[set[str]]) -> None:
    assert "torch" in stages[0]
    assert not stages[0] & (BEFORE_THE_PLAN | {"hydra", "omegaconf"})


def test_a_run_is_composed_and_planned_without_what_trains_it(stages: list[set[str]]) -> None:
    assert {"hydra", "s2train.planning"} <= stages[1]
    assert not stages[1] & BEFORE_THE_PLAN


def test_a_run_imports_no_compiler_and_nothing_that_draws_or_tracks(stages: list[set[str]]) -> None:
    assert {"megatron.core", "s2train.training.run"} <= stages[2]
    assert not stages[2] & NEVER
