"""What programs import before they need it: on some file systems each module takes milliseconds to find and read."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

# Of packages that may be installed beside, too: pulled in by another one, they would be noticed by their seconds only.
NEVER = {"wandb", "networkx", "scipy", "pandas", "pyarrow", "transformers", "datasets", "IPython", "matplotlib", "rich"}
NEVER |= {"torch._inductor.compile_fx", "torch._inductor.select_algorithm", "torch._functorch.aot_autograd"}
LIBRARIES = {"liger_kernel", "flash_attn", "cutlass", "quack", "tvm_ffi", "torch.distributed.tensor"}
BEFORE_THE_PLAN = NEVER | LIBRARIES | {"megatron", "sympy", "setuptools", "triton", "tokenizers", "torch._dynamo"}

# Of a Hopper GPU's plan, for libraries in the versions that `auto` takes, installed or not.
PLAN = f"""
import json, sys
sys.path.insert(0, {str(ROOT / "launch")!r})
import pretrain
from s2train.kernels import dense_choice
from s2train.kernels.verified import VERIFIED
from s2train.environment import liger
from s2train.planning import check, compose_run, hybrid_layout
from s2train.planning.targets import target_gpu
from s2train.validation import libraries
releases = {{entry.library: entry.release for entry in VERIFIED}}
for module in (dense_choice, liger, libraries):
    module.installed_version = releases.get
cfg = compose_run(["+model=125m_hybrid"])
gpu = target_gpu("h100")
plan = check(cfg, 1, gpu)
assert libraries.uses_fa4(cfg, hybrid_layout(cfg), gpu)
assert liger.choose_loss(cfg, gpu.capability, te=False) == "liger"
print(json.dumps(sorted(sys.modules)))
"""

BEFORE = f"""
import json, sys
sys.path.insert(0, {str(ROOT / "launch")!r})
stages = []
import job
stages.append(sorted(sys.modules))
import pretrain
stages.append(sorted(sys.modules))
print(json.dumps(stages))
"""

RUN = f"""
import gc, json, sys
sys.path.insert(0, {str(ROOT / "launch")!r})
import pretrain, torch
compile_at_once = torch.compile
from s2train.megatron import lazy_imports
lazy_imports.import_megatron()
import s2train.training.run
modules = sorted(sys.modules)
assert torch.compile is compile_at_once and gc.isenabled()
import wandb
print(json.dumps(modules))
"""


@pytest.fixture(scope="module")
def stages() -> list[set[str]]:
    """Modules of launch/job.py; of launch/pretrain.py where it composes."""
    return [set(modules) for modules in last_line_of(BEFORE)]


def last_line_of(program: str) -> Any:
    """Run a program in a new Python; return its last line, as JSON."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("COVERAGE_PROCESS_START", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_launcher_imports_torch_alone(stages: list[set[str]]) -> None:
    assert "torch" in stages[0]
    assert not stages[0] & (BEFORE_THE_PLAN | {"hydra", "omegaconf"})


def test_a_run_is_composed_and_planned_without_what_trains_it(stages: list[set[str]]) -> None:
    assert {"hydra", "s2train.planning"} <= stages[1]
    assert not stages[1] & BEFORE_THE_PLAN


def test_the_plan_of_a_gpu_imports_no_library_that_its_layers_use() -> None:
    assert not set(last_line_of(PLAN)) & BEFORE_THE_PLAN


@pytest.mark.long
def test_a_run_imports_no_compiler_and_nothing_that_draws_or_tracks() -> None:
    modules = set(last_line_of(RUN))
    assert {"megatron.core", "s2train.training.run"} <= modules
    assert not modules & NEVER
    assert not modules & {"flash_attn.cute", "cutlass"}  # Megatron imports them where they are installed
