"""Makes the commands of the quality study."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from s2train.command_line.commands import hydra_settings
from s2train.config import settings_by_name
from s2train.errors import ConfigError
from s2train.planning import compose_run
from s2train.study.files import Folders
from s2train.study.needles import Documents, needle_blend, needle_documents
from s2train.study.variants import PHASES, Phase, Run, attention_settings, has_warm_up

VOCABULARY = 32768
EVALUATIONS = 10  # of the held-out loss, in a run
MICRO_BATCH_TOKENS = 1 << 16  # that go through a GPU at once: its kernels then hide the host's work; 41 of 80 GiB
_NEW_ORDER = 1000  # added to the seed of a run that starts from another's weights: it then reads in another order
# of launch/pretrain.py, by which runs are named, found and compared
SET_IN_TRAINING = (
    "run_dir",
    "seed",
    "data.path",
    "data.valid_path",
    "data.tokenizer",
    "train.seq_length",
    "train.global_batch_size",
    "train.steps",
    "train.tokens",
    "train.exit_step",
    "optim.lr",
    "evaluation.batches",
    "evaluation.seed",
    "checkpoint.save",
    "checkpoint.resume",
    "checkpoint.weights_only",
    "checkpoint.new_data",
)
# of launch/probes.py and launch/needle.py: others would join cells of an evaluation with other settings to a result
SET_IN_EVALUATION = ("checkpoint", "output", "task", "text")
PROBED = (1024, 4096, 16384, 32768, 65536)  # lengths of the probes, up to the trained one


@dataclass(frozen=True)
class Recipe:
    """What a sweep chooses, and all runs share.

    Attributes:
        lr: learning rate.
        batch_tokens: tokens of a step.
    """

    lr: float
    batch_tokens: int


def corpus_command(folders: Folders, tree: Path) -> list[str]:
    """Return the command that makes train.jsonl and held-out.jsonl of a tree."""
    return [folders.program("make_corpus.py"), *hydra_settings({"tree": tree, "output": folders.corpus})]


def data_commands(folders: Folders) -> list[tuple[Path, list[str]]]:
    """Return the commands that tokenize the two splits.

    Each is paired with the .idx file that it writes. The first also trains the tokenizer, if there is none.
    """
    commands = []
    first = folders.tokenizer if folders.tokenizer.is_file() else f"bpe:{VOCABULARY}"
    for output, text, tokenizer in (
        (folders.train_data, folders.train_text, first),
        (folders.held_out_data, folders.held_out_text, folders.tokenizer),
    ):
        settings = {"input": text, "output": output, "tokenizer": tokenizer, "overwrite": True}
        commands.append((Path(f"{output}.idx"), [folders.program("prepare_data.py"), *hydra_settings(settings)]))
    return commands


def steps_of(run: Run, recipe: Recipe) -> tuple[int, int]:
    """Return the steps before the run's phase, and at its end."""
    phase = PHASES[run.phase]
    before = 0 if run.before is None or phase.weights_only else steps_of(run.before, recipe)[1]
    return before, before + -(-phase.tokens // recipe.batch_tokens)


def sequences_of(phase: Phase, recipe: Recipe) -> int:
    """Return the sequences of a step."""
    return max(1, recipe.batch_tokens // phase.length)


def check_devices(phase: Phase, recipe: Recipe, gpus: int) -> None:
    """Check that GPUs can share a step's sequences evenly.

    Raises:
        ConfigError: they can't.
    """
    sequences = sequences_of(phase, recipe)
    if sequences % gpus:
        problem = f"a step of phase {phase.name} has {sequences} sequences, which they can't share evenly"
        most = max(count for count in range(1, gpus) if sequences % count == 0)
        raise ConfigError("--gpu", f"{gpus} devices", problem, f"Name a number that divides them, such as {most}")


def train_settings(folders: Folders, run: Run, recipe: Recipe, gpus: int = 1) -> list[str]:
    """Return settings of launch/pretrain.py for a run on `gpus` GPUs."""
    phase = PHASES[run.phase]
    before, last = steps_of(run, recipe)
    sequences = sequences_of(phase, recipe)
    evaluations = 1 if phase.needles else EVALUATIONS
    interval = -(-(last - before) // evaluations)  # rounded down, it would leave one more for the last steps
    settings: dict[str, object] = {
        "run_dir": folders.run(run),
        **data_settings(folders, phase),
        "seed": run.seed + (_NEW_ORDER if phase.weights_only else 0),
        "train.seq_length": phase.length,
        "train.global_batch_size": sequences,
        "train.micro_batch_size": micro_batch(phase.length, sequences, gpus),
        "train.steps": last,
        "optim.lr": recipe.lr * phase.lr_factor,
        "optim.warmup_steps": max(1, (before or last) // 20),
        "evaluation.interval": interval,
        "evaluation.batches": max(1, phase.held_out_tokens // (sequences * phase.length)),
        "checkpoint.interval": 2 * interval,
        "checkpoint.keep": 1,
        "tracking.log_interval": 10,
        "tracking.wandb": "disabled",
    }
    if run.before is not None:
        settings["checkpoint.resume"] = folders.run(run.before)
        if not phase.weights_only:
            settings |= {
                "checkpoint.new_data": True,
                "checkpoint.allow_changes": True,
                "optim.decay_steps": before,
            }
        else:
            settings["checkpoint.weights_only"] = True
            if has_warm_up(run):
                settings["train.freeze_trunk_steps"] = phase.scorer_warm_up
    attention = attention_settings(run.variant, phase)
    return [*phase.model, f"model.name={run.variant}", *attention, *hydra_settings(settings)]


def check_given(own: Sequence[str], given: Sequence[str]) -> None:
    """Check that further settings leave a run what its name says.

    Args:
        own: the study's settings of the run.
        given: further ones.
    Raises:
        ConfigError: one changes the attention or a setting of `SET_IN_TRAINING`, or leaves out the held-out loss.
        hydra.errors.HydraException: the settings don't compose.
    """
    if not given:
        return
    before, now = (dict(settings_by_name(asdict(compose_run(words)))) for words in (own, [*own, *given]))
    for name in before | now:
        is_fixed = name in SET_IN_TRAINING or name.startswith(("layout.", "schedule."))
        if is_fixed and now.get(name) != before.get(name):
            problem = "the study sets it, and runs are compared by it"
            raise ConfigError(name, now.get(name), problem, "Leave it out; for another run start launch/pretrain.py")
    interval = "evaluation.interval"
    if before[interval] and not now[interval]:
        raise ConfigError(
            interval, now[interval], "the held-out loss is a run's result", "Set 1 or more, or leave it out"
        )


def micro_batch(length: int, sequences: int, gpus: int) -> int:
    """Return how many sequences go through a GPU at once.

    These are up to four sequences of 16k tokens, or fewer where the batch does not divide so.
    """
    most = max(1, MICRO_BATCH_TOKENS // length)
    return next(size for size in (4, 2, 1) if size <= most and (sequences % (size * gpus) == 0 or size == 1))


def data_settings(folders: Folders, phase: Phase) -> dict[str, object]:
    """Return the settings of the study's data and held-out samples."""
    return {
        "data.path": needle_blend(folders, phase) if phase.needles else folders.train_data,
        "data.valid_path": folders.held_out_data,
        "data.tokenizer": folders.tokenizer,
        "data.cache": folders.data / "cache",
        "evaluation.seed": None,  # as the recorded runs were evaluated; runs of one seed are compared
    }


def train_command(folders: Folders, settings: Sequence[str], gpus: int) -> list[str]:
    """Return the command that starts a run on `gpus` GPUs."""
    program = [folders.program("pretrain.py"), *settings]
    return program if gpus == 1 else [folders.program("job.py"), "--nproc-per-node", str(gpus), *program]


def run_documents(folders: Folders, run: Run, recipe: Recipe) -> list[Documents]:
    """Return a run's needle documents; none of other phases."""
    phase = PHASES[run.phase]
    if not phase.needles:
        return []
    return needle_documents(folders, phase, sequences_of(phase, recipe), steps_of(run, recipe)[1])


def probed_lengths(length: int) -> list[int]:
    """Return the lengths of the probes, up to the trained one."""
    return [probed for probed in PROBED if probed <= length] or [length]


def probes_command(folders: Folders, run: Run) -> list[str]:
    """Return the command that probes a run's last checkpoint."""
    settings = {
        "checkpoint": folders.run(run),
        "text": folders.held_out_text,
        "tokenizer": folders.tokenizer,  # the run's settings name where it was when the run began
        "lengths": probed_lengths(PHASES[run.phase].length),
        "output": folders.probes(run),
    }
    return [folders.program("probes.py"), *hydra_settings(settings)]
