"""Compare kinds of attention with the same data, budget and probes.

python launch/quality_study.py data --tree linux       a corpus of a source tree, tokenized
python launch/quality_study.py sweep                   learning rate and batch, chosen on dense
python launch/quality_study.py speed hybrid            throughput and memory of a run's first steps
python launch/quality_study.py plan                    tokens, predicted and measured seconds and memory of every run
python launch/quality_study.py train hybrid window     one run per variant, one after the other
python launch/quality_study.py evaluate hybrid         long-range probes of a trained run; 16k-needles: needle tasks
python launch/quality_study.py report                  tables, pictures and verdicts of all results
                      each: --root runs/quality  --minutes 9  --gpu 0; of a variant: --phase 16k  --seed 1
                      train --shared-gpu: other programs run on this GPU, so the run's times are not reported

Run an action again to resume it where it stopped, as it does when --minutes are over. Runs whose result is in
ROOT/results are not trained again. Settings, such as tracking.wandb=auto, go to the program that an action starts:
make_corpus.py (data), pretrain.py (sweep, speed, train), probes.py or needle.py (evaluate). Those by which runs are
compared, such as train.steps, are rejected.
`data` keeps a corpus that is there, and rejects settings that it was not made with.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import _surroundings  # noqa: F401 (prints why the rest can't start)

from _deadline import Deadline, minutes
from filelock import FileLock
from rich.console import Console

from s2train.checkpoints.integrity import damage
from s2train.checkpoints.listing import checkpoint_at, checkpoints_in
from s2train.command_line.program import run_command
from s2train.config import PretrainConfig
from s2train.errors import ConfigError
from s2train.files import check_writable
from s2train.planning import compose_run
from s2train.preparation.config import CorpusConfig
from s2train.study import speed, sweep
from s2train.study.corpus import check_made_with
from s2train.study.files import (
    Folders,
    check_corpus,
    check_data,
    check_held_out,
    check_same_split,
    check_tokenizer,
    record_split,
)
from s2train.study.needles import needle_command, save_needles
from s2train.study.plan import data_notes, plan_table
from s2train.study.report import write_report
from s2train.study.results import check_result, check_same_gpus, note_sharing, save_result, was_shared
from s2train.study.settings import (
    SET_IN_EVALUATION,
    Recipe,
    check_devices,
    check_given,
    corpus_command,
    data_commands,
    probes_command,
    run_documents,
    steps_of,
    train_command,
    train_settings,
)
from s2train.study.variants import PHASES, REHEARSAL, RUNS, SEEDS, Phase, Run, find_phase, find_run, run_density
from s2train.sweeps.jobs import changed_setting

ACTIONS = ("data", "sweep", "speed", "plan", "train", "evaluate", "report")
OF_VARIANTS = ("speed", "train", "evaluate")
USED_BY = {  # options that not all actions use
    "phase": (*OF_VARIANTS, "plan"),
    "seed": OF_VARIANTS,
    "tree": ("data",),
    "lr": (*OF_VARIANTS, "plan"),
    "batch_tokens": (*OF_VARIANTS, "plan"),
    "device": ("plan",),
    "shared_gpu": ("train",),
}


def make_documents(folders: Folders, run: Run, recipe: Recipe, deadline: Deadline) -> None:
    """Make a run's needle documents, or check those that are there.

    Waits for another process that makes them.

    Raises:
        ConfigError: they don't fit the run.
    """
    for documents in run_documents(folders, run, recipe):
        with FileLock(f"{documents.prefix}.lock"):
            if documents.index.is_file():
                documents.check(folders)
            else:
                deadline.run(documents.command)


def make_data(folders: Folders, tree: Path | None, settings: Sequence[str], deadline: Deadline) -> None:
    """Make the corpus if there is none, and tokenize what is not.

    Raises:
        ConfigError: there is a corpus of another tree or settings, or none and no tree.
    """
    if folders.held_out_text.is_file():
        check_made_with(folders, tree, settings)
        print(f"there is a corpus, {folders.corpus}")
    elif tree is not None:
        deadline.run([*corpus_command(folders, tree), *settings])
    check_corpus(folders)
    check_same_split(folders)
    check_tokenizer(folders)
    record_split(folders)
    for index, command in data_commands(folders):
        if not index.is_file():
            deadline.run(command)


def run_sweep(folders: Folders, gpus: int, settings: Sequence[str], deadline: Deadline) -> None:
    """Run the sweep's missing trials, and print the choice.

    Skips trials that have a result or that another process runs.

    Raises:
        ConfigError: data are missing, or a setting is the study's.
    """
    check_data(folders)
    for trial in map(sweep.Trial, sweep.GRID):
        check_given(trial.settings(folders, gpus), settings)
        with sweep.claimed(folders, trial) as is_due:
            if is_due:
                deadline.run(train_command(folders, [*trial.settings(folders, gpus), *settings], gpus))
                sweep.record(folders, trial)
    if others := sweep.running(folders):
        print(f"other processes run {', '.join(others)}")
    else:
        print(f"chosen: {sweep.chosen(folders)}")


def measure_speed(
    folders: Folders, run: Run, recipe: Recipe, gpus: int, settings: Sequence[str], deadline: Deadline
) -> None:
    """Run the first steps of a run to measure its speed.

    Skips a run that was measured on this number of GPUs.

    Raises:
        ConfigError: data are missing, or a setting is the study's.
    """
    if speed.key(run, gpus) in speed.read(folders):
        print(f"{speed.key(run, gpus)}: there is a result in {folders.speed}")
        return
    own = speed.speed_settings(folders, run, recipe, gpus)
    check_given(own, settings)
    own += settings
    check_data(folders)
    make_documents(folders, run, recipe, deadline)
    deadline.run(train_command(folders, own, gpus), folders.root / "programs.jsonl")
    row = speed.record(folders, run, gpus)
    print(f"{row['name']}: {row['tokens_per_s']:,.0f} tokens/s, {row['peak_memory_gib']:.1f} GiB")


def last_checkpoint(folders: Folders, run: Run, recipe: Recipe) -> Path:
    """Folder of a finished run's checkpoint."""
    return checkpoint_at(folders.run(run), steps_of(run, recipe)[1])


def recipe_of(folders: Folders, phase: Phase, given: Recipe | None) -> Recipe:
    """Return the given recipe, or else the sweep's choice.

    Raises:
        ConfigError: the rate is none, a step has no whole number of sequences, the sweep was not finished, or it was of
            another model than the phase's.
    """
    if given is not None:
        if not 0 < given.lr < math.inf:
            raise ConfigError("--lr", given.lr, "is no learning rate above 0", f"Set one, such as {sweep.GRID[0].lr:g}")
        if given.batch_tokens < 1 or given.batch_tokens % phase.length:
            problem = f"a step must have whole sequences, of {phase.length:,} tokens in phase {phase.name}"
            nearest = max(1, round(given.batch_tokens / phase.length)) * phase.length
            raise ConfigError("--batch-tokens", given.batch_tokens, problem, f"Set {nearest}")
        return given
    if phase.model != PHASES[sweep.PHASE].model:
        problem = f"has another model than the sweep, of phase {sweep.PHASE}"
        raise ConfigError("phase", phase.name, problem, "Set --lr and --batch-tokens")
    return sweep.chosen(folders)


def train(
    folders: Folders,
    run: Run,
    recipe: Recipe,
    gpus: int,
    settings: Sequence[str],
    deadline: Deadline,
    *,
    shared_gpu: bool = False,
) -> None:
    """Train a run and write its result, unless there is one.

    The run that it starts from must be trained first.

    Args:
        shared_gpu: whether other programs run on its GPU. A run that began so counts as shared ever after.
    Raises:
        ConfigError: data or the earlier run are missing, a setting is the study's, or the run was trained with another
            recipe or other settings, or on another number of GPUs.
    """
    if folders.result(run).is_file():
        check_result(folders, run, recipe)
        print(f"{run.name}: there is a result, {folders.result(run)}")
        return
    own = train_settings(folders, run, recipe, gpus)
    check_given(own, settings)
    own += settings
    check_data(folders)
    if run.before is not None and not (start := last_checkpoint(folders, run.before, recipe)).is_dir():
        problem = f"{run.name} starts from {run.before.name}, which is not trained here"
        remedy = _train_first(folders, run.before)
        if others := checkpoints_in(start.parent):
            problem = f"{run.name} starts from {start}, and only {others[-1].name} is there"
            remedy += ", or set the --batch-tokens that it was trained with"
        elif folders.result(run.before).is_file():  # with which it is not trained again
            problem, remedy = _without_weights(folders, run.before)
        raise ConfigError("phase", run.phase, problem, remedy)
    shared_gpu = shared_gpu or was_shared(folders, run)
    if not shared_gpu:
        check_same_gpus(folders, run, gpus)
    checkpoint = last_checkpoint(folders, run, recipe)
    if not checkpoint.is_dir() or damage(checkpoint):
        make_documents(folders, run, recipe, deadline)
        note_sharing(folders, run, shared_gpu)
        deadline.run(train_command(folders, own, gpus), folders.root / "programs.jsonl")
    elif (before := changed_setting(folders.run(run), compose_run(own))) is not None:
        remedy = "Give the settings and data that it was trained with, or move the folder away"
        raise ConfigError("variant", run.variant, f"{folders.run(run)} was trained with {before}", remedy)
    density = run_density(own, PHASES[run.phase].length)
    path = save_result(
        folders,
        run,
        recipe=recipe,
        density=density,
        gpus=gpus,
        settings=own,
        first_step=steps_of(run, recipe)[0],
        shared_gpu=shared_gpu,
    )
    print(path)


def _train_first(folders: Folders, run: Run) -> str:
    """Remedy of a run that is not trained."""
    return f"Train it first: {folders.command('train', run.variant, '--phase', run.phase, '--seed', run.seed)}"


def _without_weights(folders: Folders, run: Run) -> tuple[str, str]:
    """Problem and remedy of a result without a checkpoint."""
    problem = f"the result of {run.name} is here, and its weights are not"
    deleted = f"{folders.result(run)}, and its probes and needles if there are any"
    remedy = f"Copy {folders.run(run)} from where it was trained, or delete {deleted}, and train it again"
    return problem, remedy


def evaluate(folders: Folders, run: Run, settings: Sequence[str], deadline: Deadline) -> None:
    """Probe a trained run that was not probed.

    After a phase of needle documents, ask it for needles.

    Raises:
        ConfigError: the run is not trained, or a setting is the study's.
    """
    for name, _, value in (setting.partition("=") for setting in settings):
        if name.lstrip("+") in SET_IN_EVALUATION:
            problem = "the study sets it, and reads the results from there"
            remedy = "Leave it out; for other tasks or checkpoints run launch/needle.py or launch/probes.py"
            raise ConfigError(name, value, problem, remedy)
    needles = PHASES[run.phase].needles
    found = folders.needles(run) if needles else folders.probes(run)
    if found.is_file():
        print(f"{run.name}: there is a result, {found}")
        return
    if not needles:
        check_held_out(folders)
        check_same_split(folders)
    if not folders.result(run).is_file():
        raise ConfigError("variant", run.variant, f"{run.name} is not trained", _train_first(folders, run))
    if not folders.has_checkpoint(run):
        raise ConfigError("variant", run.variant, *_without_weights(folders, run))
    command = needle_command(folders, run) if needles else probes_command(folders, run)
    deadline.run([*command, *settings], folders.root / "programs.jsonl")
    if needles:
        print(save_needles(folders, run))


def main(arguments: list[str] | None = None) -> None:
    """The command line's entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("words", nargs="*", metavar="VARIANT", help="variants, and settings of the program started")
    parser.add_argument("--root", type=Path, default=Path("runs/quality"))
    parser.add_argument("--minutes", type=minutes, default=9)
    parser.add_argument("--phase", help=f"{', '.join(PHASES)}; default: {sweep.PHASE}; plan: all of its model")
    parser.add_argument("--seed", type=int, default=SEEDS[0])
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    text = "devices of this run, such as 0 or 0,1; '' for the CPU; default: the first of CUDA_VISIBLE_DEVICES, or 0"
    parser.add_argument("--gpu", default=first, help=text)
    parser.add_argument("--tree", type=Path, help="source tree to make the corpus of")
    parser.add_argument("--lr", type=float, help="learning rate, in place of the sweep's choice")
    parser.add_argument("--batch-tokens", type=int, help="tokens of a step, in place of the sweep's choice")
    parser.add_argument("--device", default="h100-80gb", help="GPU to plan for")
    parser.add_argument("--shared-gpu", action="store_true", help="train: other programs run on this GPU")
    given = parser.parse_intermixed_args(arguments)
    variants = [word for word in given.words if "=" not in word]
    settings = [word for word in given.words if "=" in word]
    if settings and given.action in ("plan", "report"):
        parser.error(f"{given.action} takes no settings: {' '.join(settings)}")
    if bool(variants) != (given.action in OF_VARIANTS):
        parser.error(f"{given.action} takes {'no variant' if variants else 'one variant or more'}")
    for name, actions in USED_BY.items():
        if given.action not in actions and getattr(given, name) != parser.get_default(name):
            parser.error(f"{given.action} takes no --{name.replace('_', '-')}")
    devices = given.gpu.split(",")
    if len(set(devices)) < len(devices) or ("" in devices and len(devices) > 1):
        parser.error(f"--gpu {given.gpu} names a device twice, or an empty one: name each once, as in --gpu 0,1")
    if (given.lr is None) != (given.batch_tokens is None):
        parser.error("--lr and --batch-tokens belong together")
    schema = CorpusConfig if given.action == "data" else PretrainConfig
    run_command(lambda: act(given, variants, settings), schema)


def act(given: argparse.Namespace, variants: Sequence[str], settings: Sequence[str]) -> None:
    """Run the action.

    Raises:
        ConfigError: something is missing, or a file doesn't fit.
    """
    folders = Folders(given.root, Path(__file__).parent)
    if given.action != "plan":
        check_writable("root", folders.root)
    devices = given.gpu.split(",")
    deadline = Deadline(given.minutes, {"CUDA_VISIBLE_DEVICES": given.gpu})
    recipe = None if given.lr is None else Recipe(given.lr, given.batch_tokens)
    phase = find_phase(given.phase or sweep.PHASE)
    runs = [find_run(variant, phase.name, given.seed) for variant in variants]
    if given.action == "data":
        make_data(folders, given.tree, settings, deadline)
    elif given.action == "sweep":
        for trial in sweep.GRID:
            check_devices(PHASES[sweep.PHASE], trial, len(devices))
        run_sweep(folders, len(devices), settings, deadline)
    elif given.action == "plan":
        swept = recipe is None and phase.model == PHASES[sweep.PHASE].model and not folders.sweep.is_file()
        planned = sweep.GRID[0] if swept else recipe_of(folders, phase, recipe)
        phases = {phase.name} if given.phase else {name for name, one in PHASES.items() if one.model == phase.model}
        own = [run for run in (*RUNS, *REHEARSAL) if run.phase in phases]
        for name in phases:
            check_devices(PHASES[name], planned, len(devices))
        note = " (the sweep has yet to choose lr, on which nothing below depends)" if swept else ""
        print(", ".join(f"{name} {value:,}" for name, value in asdict(planned).items()) + note)
        Console(width=120).print(plan_table(folders, planned, len(devices), given.device, own))
        for note in data_notes(folders, planned, own):
            print(note)
    elif given.action == "speed":
        made = recipe_of(folders, phase, recipe)
        check_devices(phase, made, len(devices))
        for run in runs:
            measure_speed(folders, run, made, len(devices), settings, deadline)
    elif given.action == "train":
        made = recipe_of(folders, phase, recipe)
        check_devices(phase, made, len(devices))
        for run in runs:
            train(folders, run, made, len(devices), settings, deadline, shared_gpu=given.shared_gpu)
    elif given.action == "evaluate":
        for run in runs:
            evaluate(folders, run, settings, deadline)
    else:
        print(*write_report(folders), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
