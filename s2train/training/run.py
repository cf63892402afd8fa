"""Runs pretraining from a configuration to the last checkpoint."""

from dataclasses import asdict
from functools import partial
from threading import Thread

import torch
from megatron.core import parallel_state
from megatron.core.timers import Timers
from megatron.core.transformer.module import MegatronModule
from torch.utils.data import Dataset

from s2train.attention.hybrid import HybridLayout
from s2train.attention.teacher import teacher_setting
from s2train.checkpoints.resume import Start, find_start
from s2train.checkpoints.run_folder import claim_run_dir
from s2train.checkpoints.run_state import TrainingState, load
from s2train.checkpoints.teacher import find_teacher, load_teacher, with_teacher
from s2train.config import PretrainConfig
from s2train.data.checks import check_data, samples_of_steps
from s2train.data.datasets import build_datasets
from s2train.data.end_token import run_tokenizer
from s2train.data.tokenizers import Tokenizer
from s2train.distributed.agreement import broadcast_from_rank_0
from s2train.distributed.ranks import is_rank_0
from s2train.distributed.rendezvous import fail_together
from s2train.environment.hardware import Hardware
from s2train.environment.versions import git_commit
from s2train.errors import DivergedError, StoppedBySignal
from s2train.megatron import setup
from s2train.megatron.layer_backends import Backend, backend_of
from s2train.megatron.model import build_model, transformer_config
from s2train.planning import Plan, hybrid_layout
from s2train.planning.report import figures, letter_rows
from s2train.preparation.bundled_corpus import ensure_prepared
from s2train.training.auxiliary_losses import AuxiliaryLosses
from s2train.training.compilers import Compilers, mark_compiled
from s2train.training.layout_picture import LayoutPicture, check_matplotlib
from s2train.training.loop import Trainer
from s2train.training.metrics import Tracker
from s2train.training.optimizer import build_optimizer, wrap_data_parallel
from s2train.training.rank_process import RankProcess
from s2train.training.run_report import describe_run, report_end, report_start
from s2train.training.signals import StopSignals
from s2train.training.start_times import StartTimes
from s2train.training.startup import check_start
from s2train.training.tensorboard import check_tensorboard
from s2train.training.warm_up import compile_kernels, run_once_per_machine
from s2train.training.watchdog import Watchdog
from s2train.validation.libraries import import_libraries
from s2train.validation.optimizers import check_offload_library
from s2train.wandb_run import choose_mode, say

# Minutes between the watchdog's timeout, which names a rank, and the timeout of collective calls, which name none.
_WATCHDOG_LEAD = 2.0

_SECONDS_FOR_WANDB = 10.0  # after a signal: the scheduler soon kills the job, and the other ranks wait


def run(cfg: PretrainConfig, plan: Plan, times: StartTimes | None = None, compilers: Compilers | None = None) -> None:
    """Check data and checkpoint, build the model, train and save.

    Rejects bad input before a process group exists. Call `use_cache_folders` before, on a GPU.

    Args:
        plan: plan of this run, checked by `s2train.planning.check`.
        times: start times measured by the program so far.
        compilers: processes that fill the kernels' caches meanwhile.
    Raises:
        ConfigError: data, tokenizer or checkpoint don't fit the run.
        StartUpError: ranks are incompatible, or one of several rejects data, tokenizer or checkpoint.
        TrainingError: the run can't continue.
        StoppedBySignal: a signal asked it to save and exit.
    """
    times = times or StartTimes()
    lock, start, teacher = None, None, None
    with fail_together():
        import_libraries(cfg, hybrid_layout(cfg), plan.hardware)
        check_offload_library(cfg)
        check_tensorboard(cfg)
        check_matplotlib()
        times.end("libraries")
        backend = backend_of(cfg)
        cfg, tokenizer = run_tokenizer(cfg)
        if is_rank_0():  # the others wait for it at the rendezvous
            ensure_prepared(cfg)
            check_data(cfg, tokenizer)
            teacher = find_teacher(cfg, tokenizer)
            start = find_start(with_teacher(cfg, teacher))
            if (done := start.progress.step) >= cfg.train.last_step:
                print(f"nothing to do: {start.checkpoint} is at step {done} of {cfg.train.steps}", flush=True)
            else:
                lock = claim_run_dir(cfg, start.checkpoint)
                choose_mode(cfg.tracking.wandb)  # reject a bad mode now
    times.end("checks")
    minutes = cfg.train.timeout_minutes
    device = setup.initialize(
        cfg.parallel,
        cfg.seed,
        partial(check_start, cfg, plan),
        deterministic=cfg.train.deterministic,
        timeout_minutes=minutes + _WATCHDOG_LEAD,
    )
    setup.connect(cfg.parallel, device)
    # Ranks that read a shared disk themselves could find different checkpoints.
    start, teacher = broadcast_from_rank_0((start, teacher))
    assert start is not None
    cfg = with_teacher(cfg, teacher)
    times.end("process groups")
    stop: StoppedBySignal | DivergedError | None = None
    with StopSignals().listening() as signals:
        if start.progress.step < cfg.train.last_step:
            try:
                with Watchdog(minutes).watching() as watchdog:
                    process = RankProcess(device, signals, watchdog, times)
                    _train(cfg, plan, backend, tokenizer, start, process, compilers)
            except (StoppedBySignal, DivergedError) as raised:  # on all ranks
                stop = raised
        setup.shutdown()
    if lock is not None:
        lock.release()
    if stop is not None:
        raise stop


def _train(
    cfg: PretrainConfig,
    plan: Plan,
    backend: Backend,
    tokenizer: Tokenizer,
    start: Start,
    process: RankProcess,
    compilers: Compilers | None,
) -> None:
    hybrid = hybrid_layout(cfg)
    device, watchdog, times = process.device, process.watchdog, process.times
    is_first = torch.distributed.get_rank() == 0
    if is_first:
        Thread(target=git_commit, name="commit", daemon=True).start()  # cached for the tracker
    _prepare_kernels(cfg, plan, hybrid, process, compilers)
    timers = Timers(log_level=cfg.tracking.timing, log_option="minmax")
    models, state = _build(cfg, plan, hybrid, backend, start, device, timers)
    times.end("model")
    if start.checkpoint is not None:
        watchdog.beat("loading the checkpoint")
        load(cfg, state, start.checkpoint, start.rng_ranks)
        times.end("checkpoint")
    teacher = None
    if teacher_setting(hybrid.layers) is not None:
        watchdog.beat("loading the teacher")
        teacher = load_teacher(cfg, hybrid, backend, device, state.chunks)
        times.end("teacher")
    watchdog.beat("opening the data")
    consumed = start.progress.consumed_samples
    last_sample = consumed + samples_of_steps(cfg, start.progress.step, consumed)
    train_set, held_out_set = _open_data(cfg, tokenizer, start, last_sample)
    times.end("data")
    tracker = Tracker(cfg, start.progress, active=is_first, plan=figures(plan))
    if is_first:
        description = describe_run(cfg, hybrid, models, state.optimizer, backend, tokenizer, device)
        report_start(cfg, start, description, last_sample, tracker)
    picture = LayoutPicture(cfg, hybrid, tracker, active=is_first)
    times.end("records")
    if plan.exchanges:
        tracker.event("cp exchange", layers=[asdict(exchange) for exchange in plan.exchanges])
    tracker.event("ready", seconds=times.seconds)
    if is_first:
        say(f"ready after {times}")
    tracker.table("layout/sparse_layers", ["letter", "layers", "keeps", "density"], letter_rows(plan))
    trainer = Trainer(
        cfg,
        plan,
        state,
        train_set,
        held_out_set,
        process,
        tracker=tracker,
        timers=timers,
        after_first_step=picture.start,
        auxiliary=AuxiliaryLosses(cfg, hybrid, state.chunks, state.optimizer.scale_loss),
        teacher=teacher,
    )
    try:
        with picture:
            saved = trainer.train(start.progress)
    except (StoppedBySignal, DivergedError) as stop:
        tracker.close(_SECONDS_FOR_WANDB if isinstance(stop, StoppedBySignal) else None)
        raise
    if is_first and (curve := report_end(cfg, saved, picture.path)) is not None:
        tracker.picture("train/loss_curve", curve)
    tracker.close()


def _prepare_kernels(
    cfg: PretrainConfig, plan: Plan, hybrid: HybridLayout, process: RankProcess, compilers: Compilers | None
) -> None:
    """Wait for the kernels' compilers, and compile what they left."""
    process.watchdog.beat("compiling the kernels")
    if compilers is not None:
        say(compilers.wait())
        process.times.end("compilers")
    run_once_per_machine(partial(_compile, cfg, hybrid, plan.hardware, process.device))
    process.times.end("kernels")


def _compile(cfg: PretrainConfig, hybrid: HybridLayout, hardware: Hardware, device: torch.device) -> None:
    compile_kernels(cfg, hybrid, device, parallel_state.get_context_parallel_rank())
    if device.type == "cuda":
        mark_compiled(cfg, hybrid, hardware)


def _build(
    cfg: PretrainConfig,
    plan: Plan,
    hybrid: HybridLayout,
    backend: Backend,
    start: Start,
    device: torch.device,
    timers: Timers,
) -> tuple[list[MegatronModule], TrainingState]:
    """Build this rank's model chunks, and what trains them."""
    by_cost = cfg.parallel.pp > 1 and cfg.parallel.pipeline_split == "cost"
    config = transformer_config(cfg, plan.pipeline.stages if by_cost else None)
    config.timers = timers if cfg.tracking.timing else None
    models = build_model(cfg, config, hybrid, backend, device)
    chunks = wrap_data_parallel(cfg, config, models)
    optimizer, scheduler = build_optimizer(cfg, config, chunks, decays_gains=start.progress.decays_gains)
    return models, TrainingState(chunks, optimizer, scheduler)


def _open_data(
    cfg: PretrainConfig, tokenizer: Tokenizer, start: Start, last_sample: int
) -> tuple[Dataset, Dataset | None]:
    """Open the training set up to `last_sample`, and the held-out set."""
    held_out_samples = cfg.evaluation.batches * cfg.train.global_batch_size if cfg.evaluation.interval else 0
    train_set, held_out_set = build_datasets(
        cfg,
        tokenizer,
        start.progress.order["data.num_samples"],
        held_out_samples,
        last_sample=last_sample,
    )
    assert train_set is not None  # check_data rejects data without training samples
    return train_set, held_out_set
