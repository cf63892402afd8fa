"""Train a small model to find needles at 128k tokens.

Trains from scratch on one GPU, in phases of increasing length.

python launch/needle_recipe.py plan                   print phases, tokens and predicted seconds
python launch/needle_recipe.py data                   make the training documents of all variants
python launch/needle_recipe.py train hybrid           train all phases, one after the other
python launch/needle_recipe.py evaluate hybrid        evaluate the last trained phase up to the longest length
python launch/needle_recipe.py curve hybrid           evaluate every checkpoint at two lengths
python launch/needle_recipe.py extend hybrid          continue the first phase at four times its length under YaRN, and
                      evaluate it there before and after
                      each: --root runs/needle  --minutes 9; train and extend also take settings of launch/pretrain.py

`train`, `evaluate` and `extend` stop after --minutes; the same command resumes them. The times of their programs are
written to ROOT/VARIANT/programs.jsonl.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import _surroundings  # noqa: F401 (prints why the rest can't start)

from _deadline import Deadline, minutes
from rich.console import Console
from rich.table import Table

from s2train.checkpoints.listing import checkpoint_at, checkpoints_of
from s2train.command_line.commands import hydra_setting, hydra_settings, python_command
from s2train.costs.prediction import ModelCosts, model_costs
from s2train.environment.cores import available_cores
from s2train.needles.recipe import PHASES, Phase, document_settings, evaluation_settings
from s2train.planning import compose_run, hybrid_layout
from s2train.sweeps.jobs import changed_setting

LAUNCH = Path(__file__).parent
# Hybrids of other kinds of attention; no step of them was measured, so none is predicted.
UNPREDICTED = ("moba", "index", "sea", "hyper")
VARIANTS = ("hybrid", "dense", "sparse_shifted", "sparse_homogeneous", "hybrid_homogeneous", *UNPREDICTED)
GRID = (8192, 16384, 32768, 65536, 131072)  # lengths of `evaluate`
CURVE = (8192, 32768)  # lengths of `curve`
# Lengths of `extend`, which continues the first phase: within its 512 tokens some frequencies make few turns. Within
# 32,768 tokens even the slowest of this model makes 70, and YaRN would change none.
EXTENDED = (2048, 8192)
HELD_OUT = 0.02  # share of the documents, for the loss after each phase


def last_step(number: int) -> int:
    """Return the last step of phase `number`, counted through all phases."""
    return sum(phase.steps for phase in PHASES[: number + 1])


def tokenizer(root: Path) -> Path:
    """Return the tokenizer: a byte-level BPE trained on the first documents."""
    return Path(f"{data_prefix(root, PHASES[0], PHASES[0].blend[0][0])}-tokenizer.json")


def data_prefix(root: Path, phase: Phase, name: str) -> Path:
    return root / "data" / f"{phase.name}-{name}"


def data_index(root: Path, phase: Phase, name: str) -> Path:
    return Path(f"{data_prefix(root, phase, name)}.idx")


def data_commands(root: Path, phase: Phase) -> list[list[str]]:
    """Return the commands that make a phase's documents, one per source."""
    commands = []
    for number, (name, _) in enumerate(phase.blend):
        makes_tokenizer = phase is PHASES[0] and number == 0
        commands.append(
            [
                str(LAUNCH / "prepare_data.py"),
                hydra_setting("output", data_prefix(root, phase, name)),
                hydra_setting("tokenizer", "bpe:1024" if makes_tokenizer else tokenizer(root)),
                *document_settings(phase, name, HELD_OUT),
            ]
        )
    return commands


def train_command(root: Path, variant: str, number: int, under_yarn: bool = False) -> list[str]:
    """Return the command that trains or resumes phase `number`.

    Args:
        under_yarn: scale RoPE from the length of the phase before, in a separate folder.
    """
    phase, run = PHASES[number], run_folder(root, variant, number, under_yarn)
    before = PHASES[number - 1].length
    scaling = f"model.rope_scaling={{kind:yarn,factor:{phase.length // before},original_length:{before}}}"
    settings: dict[str, object] = {"run_dir": run}
    if number > 0 and not checkpoints_of(run):
        settings["checkpoint.resume"] = run_folder(root, variant, number - 1)
        settings["checkpoint.new_data"] = True
    settings |= {
        "data.path": [part for name, weight in phase.blend for part in (weight, data_prefix(root, phase, name))],
        "data.tokenizer": tokenizer(root),
        "data.cache": root / "data" / "cache",
        "train.seq_length": phase.length,
        "train.global_batch_size": phase.batch,
        "train.micro_batch_size": phase.micro,
        "train.steps": last_step(number),
        "optim.decay_steps": last_step(len(PHASES) - 1),
        "evaluation.interval": 250,
        "evaluation.batches": 1 if phase.length > 8192 else 4,
        "checkpoint.interval": 1000 if number == 0 else phase.steps,
        "tracking.log_interval": 20,
        "data.num_workers": 4,
    }
    return [
        str(LAUNCH / "pretrain.py"),
        f"+model=needle_{variant}",
        *([scaling] if under_yarn else []),
        f"data.split=[{100 * (1 - HELD_OUT):g},{100 * HELD_OUT:g},0]",
        *hydra_settings(settings),
    ]


def needle_command(root: Path, checkpoint: Path, lengths: list[int], trials: int, output: Path) -> list[str]:
    """Return the command that evaluates a checkpoint, `trials` per depth."""
    return [str(LAUNCH / "needle.py"), *evaluation_settings(checkpoint, tokenizer(root), lengths, trials, output)]


def curve_commands(root: Path, checkpoints: Sequence[Path]) -> list[list[str]]:
    """Return the commands that evaluate the remaining checkpoints, into their run folders."""
    outputs = [checkpoint.parents[1] / "needle" / checkpoint.name for checkpoint in checkpoints]
    return [
        needle_command(root, checkpoint, list(CURVE), 2, output)
        for checkpoint, output in zip(checkpoints, outputs, strict=True)
        if not (output / "needle.png").is_file()
    ]


def run_folder(root: Path, variant: str, number: int, under_yarn: bool = False) -> Path:
    return root / variant / f"{PHASES[number].name}{'-yarn' if under_yarn else ''}"


def extend_commands(root: Path, variant: str) -> list[list[str]]:
    """Return the commands that extend a variant to longer sequences.

    They evaluate the first phase beyond its length, continue its training there, and evaluate again.
    """
    before, after = run_folder(root, variant, 0), run_folder(root, variant, 1, under_yarn=True)
    return [
        needle_command(root, before, list(EXTENDED), 10, root / variant / "before-yarn"),
        train_command(root, variant, 1, under_yarn=True),
        needle_command(root, after, list(EXTENDED), 10, root / variant / "after-yarn"),
    ]


def is_trained(root: Path, variant: str, number: int) -> bool:
    """Whether phase `number` is complete."""
    return checkpoint_at(run_folder(root, variant, number), last_step(number)).is_dir()


def trained_otherwise(root: Path, variant: str, last: int, settings: Sequence[str]) -> str | None:
    """Find a complete phase up to `last` that had other settings.

    It would not be trained again, and later phases would start from it. Returns an error, or None.
    """
    for number in filter(partial(is_trained, root, variant), range(last + 1)):
        run = run_folder(root, variant, number)
        asked = compose_run([*train_command(root, variant, number)[1:], *settings])
        if (before := changed_setting(run, asked)) is not None:
            return f"{run} was trained with {before}: set another --root, or the settings that it was trained with"
    return None


def make_data(root: Path, last: int, deadline: Deadline) -> None:
    """Make the documents of all phases up to `last`.

    The first program also trains the tokenizer. The others run concurrently and divide the cores by their tokens.
    """
    first, *others = [
        (data_index(root, phase, name), weight * phase.samples * phase.length, command)
        for phase in PHASES[: last + 1]
        for (name, weight), command in zip(phase.blend, data_commands(root, phase), strict=True)
    ]
    if not first[0].is_file():
        deadline.run(first[2])
    waiting = [(tokens, command) for index, tokens, command in others if not index.is_file()]
    cores, total = available_cores(), sum(tokens for tokens, _ in waiting)
    commands = [[*command, f"needles.workers={max(1, round(cores * n / total))}"] for n, command in waiting]
    deadline.run_together(commands, cores)


def plan_table(root: Path) -> Table:
    """Tabulate predicted H100 seconds of forward and backward per phase."""
    predicted = [variant for variant in VARIANTS if variant not in UNPREDICTED]
    table = Table("phase", "steps", "tokens", *predicted, title="predicted seconds, excluding starting and saving")
    sums = dict.fromkeys(predicted, 0.0)
    for number, phase in enumerate(PHASES):
        row = []
        for variant in predicted:
            costs = phase_costs(root, variant, number)
            # Rates were measured with head_dim 128; 64 uses half of the tensor cores' rate.
            seconds = phase.samples * (costs.linear_seconds + 128 / costs.head_dim * costs.attention_seconds)
            sums[variant] += seconds
            row.append(f"{seconds:.0f}")
        table.add_row(phase.name, str(phase.steps), f"{phase.samples * phase.length / 1e6:.0f}M", *row)
    table.add_row("all", str(last_step(len(PHASES) - 1)), "", *(f"{seconds:.0f}" for seconds in sums.values()))
    return table


def phase_costs(root: Path, variant: str, number: int) -> ModelCosts:
    """Return the costs of one sequence of phase `number`."""
    cfg = compose_run(train_command(root, variant, number)[1:])
    return model_costs(cfg.model, hybrid_layout(cfg), cfg.train.seq_length)


def train(root: Path, variant: str, last: int, settings: Sequence[str], deadline: Deadline) -> None:
    """Train the phases up to `last` that are not trained."""
    if not tokenizer(root).is_file():
        sys.exit(f"no data in {root}: first run {own_command('data', root)}")
    if settings and (problem := trained_otherwise(root, variant, last, settings)):
        sys.exit(problem)
    for number in range(last + 1):
        if not is_trained(root, variant, number):
            deadline.run([*train_command(root, variant, number), *settings], record_file(root, variant))


def extend(root: Path, variant: str, settings: Sequence[str], deadline: Deadline) -> None:
    """Extend the first phase to longer sequences, evaluated before and after."""
    if not is_trained(root, variant, 0):
        remedy = f"{train_first(root, variant)} --longest {PHASES[0].length}"
        sys.exit(f"the first phase of {variant} is not trained: {remedy}")
    indices = [data_index(root, PHASES[1], name) for name, _ in PHASES[1].blend]
    if missing := [path for path in indices if not path.is_file()]:
        remedy = f"run {own_command('data', root)} --longest {PHASES[1].length}"
        sys.exit(f"no {missing[0].name} in {missing[0].parent}: first {remedy}")
    before, continued, after = extend_commands(root, variant)
    for command in (before, [*continued, *settings], after):
        deadline.run(command, record_file(root, variant))


def curve(root: Path, variant: str, last: int, deadline: Deadline) -> None:
    """Evaluate every checkpoint of the phases up to `last`."""
    runs = [run_folder(root, variant, number) for number in range(last + 1)]
    checkpoints = [path for run in runs for path in checkpoints_of(run)]
    if not checkpoints:
        sys.exit(f"no checkpoint of {variant} in {root}: {train_first(root, variant)}")
    deadline.run_together(curve_commands(root, checkpoints), 6)  # on one GPU: start-up dominates


def evaluate(root: Path, variant: str, last: int, longest: int, deadline: Deadline) -> None:
    """Evaluate the last trained phase, over `GRID` up to `longest` tokens."""
    trained = [number for number in range(last + 1) if is_trained(root, variant, number)]
    if not trained:
        sys.exit(f"no phase of {variant} is trained: {train_first(root, variant)}")
    lengths = [length for length in GRID if length <= longest]
    run = run_folder(root, variant, trained[-1])
    deadline.run(needle_command(root, run, lengths, 10, root / variant / "grid"), record_file(root, variant))


def record_file(root: Path, variant: str) -> Path:
    return root / variant / "programs.jsonl"


def train_first(root: Path, variant: str) -> str:
    return f"first run {own_command('train', root, variant)}"


def own_command(action: str, root: Path, *words: str) -> str:
    """Return the shell command that takes an action of the recipe."""
    return python_command("launch/needle_recipe.py", action, *words, "--root", root)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("plan", "data", "train", "evaluate", "curve", "extend"))
    parser.add_argument("variant", choices=VARIANTS, nargs="?", default="hybrid")
    parser.add_argument("--root", type=Path, default=Path("runs/needle"))
    parser.add_argument("--minutes", type=minutes, default=9)  # saving may take longer
    parser.add_argument("--longest", type=int, default=PHASES[-1].length, help="skip longer phases")
    given, settings = parser.parse_known_args(arguments)
    if wrong := [setting for setting in settings if "=" not in setting or setting.startswith("-")]:
        parser.error(f"unknown: {' '.join(wrong)}")
    if settings and given.action not in ("train", "extend"):
        parser.error(f"settings ({' '.join(settings)}) apply to train and extend only; {given.action} takes none")
    phases = [number for number, phase in enumerate(PHASES) if phase.length <= given.longest]
    if not phases:
        parser.error(f"--longest {given.longest}: the first phase has {PHASES[0].length} tokens")
    deadline, root, variant, last = Deadline(given.minutes), given.root, given.variant, phases[-1]
    if given.action == "plan":
        Console(width=140).print(plan_table(root))
    elif given.action == "data":
        make_data(root, last, deadline)
    elif given.action == "train":
        train(root, variant, last, settings, deadline)
    elif given.action == "extend":
        extend(root, variant, settings, deadline)
    elif given.action == "curve":
        curve(root, variant, last, deadline)
    else:
        evaluate(root, variant, last, given.longest, deadline)


if __name__ == "__main__":
    main()
