"""Pretrain a model.

python launch/job.py --nproc-per-node N launch/pretrain.py +model=tiny_hybrid [setting=value …]

job.py runs torchrun and reports errors in one line; plain torchrun works too, and python for one process.
Sweep: `python launch/pretrain.py -m +model=tiny_hybrid layout=dense,s2_b16_l4_v4 seed=1,2` (s2train/sweeps).
`plan=true` prints what the run would cost and builds nothing; `plan.device=h100-80gb plan.count=8` plans for GPUs that
this machine doesn't have. `plan.gpus=64 plan.device=h100-80gb` proposes how to divide the model over 64 of them.
"""

import _quick_imports  # pauses garbage collection
import _surroundings  # prints why the rest can't start

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from s2train.kernels.compiler import prepare_compiler

from s2train import config
from s2train.checkpoints.named_start import named_start
from s2train.command_line.composition import CONF, config_groups
from s2train.command_line.program import run_command, run_hydra
from s2train.distributed.ranks import is_rank_0, world_size
from s2train.distributed.rendezvous import check_ranks, fail_together
from s2train.environment.apex import apex_available
from s2train.environment.dtypes import DTYPES
from s2train.environment.hardware import check_gpus, detect_own, open_device
from s2train.environment.hardware_queues import order_communication
from s2train.environment.imports import quick_imports
from s2train.errors import ConfigError
from s2train.planning import (
    asked_plan,
    check,
    epochs_of_plan,
    format_plan,
    format_proposal,
    hybrid_layout,
    propose,
    resolve,
)
from s2train.sweeps import plugins
from s2train.training.compilers import start_compilers
from s2train.training.kernel_caches import use_cache_folders
from s2train.training.start_times import StartTimes

config.register()
plugins.register()
MODELS = config_groups(CONF)["model"]
_quick_imports.end()
TIMES = StartTimes(_surroundings.BEGAN)
TIMES.end("imports")


def pretrain(composed: DictConfig) -> None:
    """Check the settings, then train."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        remedy = "Leave hydra/launcher out, or set it to s2train_local or s2train_slurm"
        raise ConfigError("hydra/launcher", "(another)", "each job of a sweep needs its own processes", remedy)
    TIMES.end("compose")
    check_ranks()
    is_first = is_rank_0()
    with fail_together():
        cfg = resolve(composed, MODELS, HydraConfig.get().overrides.task)
        if cfg.plan.asked:
            if is_first and cfg.plan.gpus is not None:
                print(format_proposal(propose(cfg)))
            elif is_first:
                print(format_plan(asked_plan(cfg, world_size())))
                print(epochs_of_plan(cfg))
            if is_first and (start := named_start(cfg)) is not None:
                print(start)
            return
        TIMES.end("plan")
        lost = order_communication(cfg.parallel)  # before the driver is asked
        hardware = detect_own()
        check_gpus()
        open_device(None if cfg.train.deterministic else DTYPES.get(cfg.train.precision))  # checked below
        TIMES.end("device")
        plan = check(cfg, world_size(), hardware)
        apex_available()  # rejects another package named apex, which Megatron would import
    if is_first:
        print(format_plan(plan), flush=True)
        if lost is not None:
            print(lost, flush=True)
    TIMES.end("plan")
    compilers = None
    with quick_imports():  # slow, and not needed to reject a run
        if hardware.capability is not None:
            use_cache_folders()
            compilers = start_compilers(cfg, hybrid_layout(cfg), hardware)
            prepare_compiler(hardware.capability)
        from s2train.megatron.lazy_imports import import_megatron

        import_megatron()
        from s2train.training.run import run
    TIMES.end("megatron")
    run(cfg, plan, TIMES, compilers)


@hydra.main(config_path="../conf", config_name="pretrain", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Run Hydra's main."""
    run_command(lambda: pretrain(composed))


# Saving starts processes that import this file again.
if __name__ == "__main__":
    of_sweeps = dict.fromkeys((config.LocalSweepConfig, config.SlurmSweepConfig), "hydra.launcher")
    run_hydra(main, config.PretrainConfig, __doc__, of_sweeps)
