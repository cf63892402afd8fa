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
NEVER |= {"peft", "tensorboard", "torchvision", "sklearn"}
NEVER |= {"torch._inductor.compile_fx", "torch._inductor.select_algorithm", "torch._functorch.aot_autograd"}
LIBRARIES = {"liger_kernel", "flash_attn", "cutlass", "quack", "tvm_ffi", "torch.distributed.tensor"}
BEFORE_THE_PLAN = NEVER | LIBRARIES | {"megatron", "sympy", "setuptools", "triton", "tokenizers", "torch._dynamo"}
# Megatron or Liger-Kernel import these where they are installed.
BESIDE = ("peft", "tensorboard", "transformers")

# The plan is of a Hopper GPU, for libraries in the versions that `auto` takes, installed or not.
START = f"""
import gc, json, sys
sys.path.insert(0, {str(ROOT / "launch")!r})
stages = {{}}

def end(name):
    stages[name] = sorted(sys.modules)

import job
end("launcher")

import pretrain, torch
end("composed")

from s2train.kernels import dense_choice
from s2train.kernels.verified import VERIFIED
from s2train.environment import liger
from s2train.planning import check, compose_run, hybrid_layout
from s2train.planning.targets import target_gpu
from s2train.validation import libraries
installed = liger.installed_version(liger.PACKAGE)
releases = {{entry.library: entry.release for entry in VERIFIED}}
for module in (dense_choice, liger, libraries):
    module.installed_version = releases.get
cfg = compose_run(["+model=125m_hybrid"])
gpu = target_gpu("h100")
plan = check(cfg, 1, gpu)
assert libraries.uses_fa4(cfg, hybrid_layout(cfg), gpu)
assert liger.choose_loss(cfg, gpu.capability, te=False) == "in_place"
end("planned")

compile_at_once = torch.compile
from s2train.megatron import lazy_imports
lazy_imports.import_megatron()
import s2train.training.run
assert torch.compile is compile_at_once and gc.isenabled()
assert installed is None or liger.liger_problem() is None
end("imported")

import {", ".join(BESIDE)}, wandb
print(json.dumps(stages))
"""


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Modules imported by the end of each stage of a start."""
    beside = tmp_path_factory.mktemp("beside")
    for package in BESIDE:
        (beside / f"{package}.py").touch()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{beside}:{ROOT}"}
    environment.pop("COVERAGE_PROCESS_START", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", START], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: set(modules) for name, modules in json.loads(done.stdout.splitlines()[-1]).items()}


def test_the_launcher_imports_torch_alone(stages: dict[str, set[str]]) -> None:
    assert "torch" in stages["launcher"]
    assert not stages["launcher"] & (BEFORE_THE_PLAN | {"hydra", "omegaconf"})


def test_a_run_is_composed_without_what_trains_it(stages: dict[str, set[str]]) -> None:
    assert {"hydra", "s2train.planning"} <= stages["composed"]
    assert not stages["composed"] & BEFORE_THE_PLAN


def test_the_plan_of_a_gpu_imports_no_library_that_its_layers_use(stages: dict[str, set[str]]) -> None:
    assert not stages["planned"] & BEFORE_THE_PLAN


def test_a_run_imports_no_compiler_and_nothing_that_draws_or_tracks(stages: dict[str, set[str]]) -> None:
    assert {"megatron.core", "s2train.training.run"} <= stages["imported"]
    assert not stages["imported"] & NEVER
    assert not stages["imported"] & {"flash_attn.cute", "cutlass"}  # Megatron imports them where they are installed
