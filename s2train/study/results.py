"""Collects a run's measurements in one small file, and reads these files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from s2train.comparison.runs import Summary, summarize
from s2train.environment.provenance import environment
from s2train.errors import ConfigError
from s2train.files import write_json
from s2train.needles.scores import Score
from s2train.study.files import Folders, naming, read_texts
from s2train.study.protocol import needle_settings
from s2train.study.recall import Recall, recall_curve
from s2train.study.settings import Recipe
from s2train.study.values import count, number
from s2train.study.variants import PHASES, Run, counts_exactly
from s2train.training.records import last_evaluation, read_records


@dataclass(frozen=True)
class Result:
    """What one run measured.

    Attributes:
        gpus: number of devices.
        density: kept over causal positions.
        held_out: (tokens, GPU-seconds, loss) of each evaluation; seconds are steps times the median step.
        by_position: (first, one past the last, loss) at the end.
        counts_exactly: whether the density is exact; else expected.
        shared_gpu: whether other programs ran on its GPU, so that its seconds and throughput mean nothing.
        device: GPU model; None in files that don't name it.
        settings: of the program that trained it.
        texts: fingerprints of both splits and the tokenizer; None in files that don't have them.
        recall: of selected blocks; empty without them.
        probes: content of RUN-probes.json; None: not probed.
        needles: scores of RUN-needles.json by task and length, over all depths; None: not asked for.
        needle_settings: by which they were asked for.
    """

    run: Run
    gpus: int
    density: float
    recipe: Recipe
    summary: Summary
    held_out: list[tuple[int, float, float]]
    by_position: list[tuple[int, int, float | None]]
    counts_exactly: bool = True
    shared_gpu: bool = False
    device: str | None = None
    settings: tuple[str, ...] = ()
    texts: dict[str, str] | None = None
    recall: tuple[Recall, ...] = ()
    probes: dict[str, Any] | None = None
    needles: dict[tuple[str, int], Score] | None = None
    needle_settings: dict[str, dict[str, Any]] | None = None

    @property
    def loss(self) -> float:
        """Held-out loss at the end."""
        return self.held_out[-1][2]


def was_shared(folders: Folders, run: Run) -> bool:
    """Whether a start that a run resumes shared its GPU."""
    return folders.shared_gpu(run).is_file() and _has_begun(folders, run)


def note_sharing(folders: Folders, run: Run, is_shared: bool) -> None:
    """Note in a run's folder whether other programs run on its GPU."""
    note = folders.shared_gpu(run)
    if is_shared:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
    else:
        note.unlink(missing_ok=True)


def check_result(folders: Folders, run: Run, recipe: Recipe) -> None:
    """Check that a run's result has this recipe and these texts.

    Raises:
        ConfigError: it is of others, or the file can't be read.
    """
    path = folders.result(run)
    with naming(path):
        content = json.loads(path.read_text())
        made = Recipe(**content["recipe"])
    if made != recipe:
        option, value, before = next(
            (f"--{name.replace('_', '-')}", now, then)
            for (name, now), then in zip(asdict(recipe).items(), asdict(made).values(), strict=True)
            if now != then
        )
        remedy = f"Give its --lr {made.lr:g} --batch-tokens {made.batch_tokens}, or set another root"
        raise ConfigError(option, value, f"{path} is of a run with {before}", remedy)
    texts, here = content.get("texts"), read_texts(folders)
    if texts and here and texts != here:
        problem = f"{path} is of a run on other texts than those in {folders.data}"
        raise ConfigError("root", folders.root, problem, "Move the file away, or set another root")


def check_same_gpus(folders: Folders, run: Run, gpus: int) -> None:
    """Check that a run began on this number of GPUs.

    Its times would otherwise be of several numbers.

    Raises:
        ConfigError: its checkpoints are of another number.
    """
    if not _has_begun(folders, run):
        return
    for record in read_records(folders.run(run) / "metrics.jsonl"):
        # files from before it was recorded lack it
        if record.get("event") == "config" and (before := record.get("processes", gpus)) != gpus:
            problem = f"{run.name} was trained on {before} GPUs, and its times would be of both numbers"
            remedy = f"Name {before} devices, or add --shared-gpu, which leaves its times out"
            raise ConfigError("--gpu", f"{gpus} devices", problem, remedy)


def _has_begun(folders: Folders, run: Run) -> bool:
    """Whether a run has a checkpoint to resume from, with its metrics."""
    return (folders.run(run) / "metrics.jsonl").is_file() and folders.has_checkpoint(run)


def save_result(
    folders: Folders,
    run: Run,
    *,
    recipe: Recipe,
    density: float,
    gpus: int,
    settings: Sequence[str],
    first_step: int = 0,
    shared_gpu: bool = False,
) -> Path:
    """Write ROOT/results/RUN.json from a finished run's metrics.

    Args:
        first_step: steps of earlier phases.
        shared_gpu: whether other programs ran on its GPU.

    Raises:
        ConfigError: the run's last held-out loss is missing or not finite.
    """
    folder = folders.run(run)
    summary = summarize(folder)
    records = read_records(folder / "metrics.jsonl")
    last = last_evaluation(records)
    if last is None or last["held_out_loss"] is None:
        raise ConfigError("runs", folder, "ends without a finite held-out loss", "Train it again in another root")
    content = {
        "run": asdict(run),
        "gpus": gpus,
        "density": density,
        "counts_exactly": counts_exactly(list(settings)),
        "shared_gpu": shared_gpu,
        "recipe": asdict(recipe),
        "summary": asdict(summary),
        "held_out": [
            [
                one["consumed_tokens"],
                (one["step"] - first_step) * summary.step_time_s * gpus,
                one["held_out_loss"],
            ]
            for one in records
            if one.get("held_out_loss") is not None
        ],
        "by_position": last["held_out_loss_by_position"],
        "recall": [asdict(one) for one in recall_curve(records)],
        "settings": list(settings),
        "texts": read_texts(folders),
        "environment": environment(),
    }
    path = folders.result(run)
    write_json(path, content)
    return path


def read_results(folders: Folders) -> list[Result]:
    """Read all results of a study, in order of file names.

    Raises:
        ConfigError: there are none, a file can't be read, or its content is not that of a run of its name.
    """
    skipped = {folders.sweep.name, folders.speed.name}
    paths = sorted(
        path
        for path in folders.results.glob("*.json")
        if path.name not in skipped and not path.stem.endswith(("-probes", "-needles"))
    )
    if not paths:
        remedy = f"Run {folders.command('train', 'VARIANT')}"
        raise ConfigError("root", folders.root, f"{folders.results} holds no results", remedy)
    results = [_read(folders, path) for path in paths]
    _check_alone(folders, paths)
    _check_positions(dict(zip(paths, results, strict=True)))
    return results


def _check_run(path: Path, run: Run) -> None:
    """Check that a file is named by its run.

    A renamed copy would count as one more seed.
    """
    if path.stem != run.name:
        raise ConfigError("root", path, f"holds the result of {run.name}", "Move it away, or give it that name")
    if run.phase not in PHASES:
        problem = f"is of phase {run.phase}, and this version has {', '.join(PHASES)}"
        raise ConfigError("root", path, problem, "Move it away")


def _check_alone(folders: Folders, results: Sequence[Path]) -> None:
    """Check that probes and needles have the result of their run."""
    names = {path.stem for path in results}
    for path in sorted(folders.results.glob("*.json")):
        run, _, kind = path.stem.rpartition("-")
        if kind in ("probes", "needles") and run not in names:
            remedy = f"Copy {run}.json there too, or move the file away"
            raise ConfigError("root", path, f"there is no result of its run, {run}.json", remedy)


def _check_positions(results: Mapping[Path, Result]) -> None:
    """Check that all losses of a phase are of the same positions."""
    first: dict[str, Path] = {}
    for path, result in results.items():
        other = first.setdefault(result.run.phase, path)
        if [part[:2] for part in result.by_position] != [part[:2] for part in results[other].by_position]:
            problem = f"its losses are of other positions than those of {other}"
            raise ConfigError("root", path, problem, "Move one of the two away")


def _read(folders: Folders, path: Path) -> Result:
    with naming(path):
        content = json.loads(path.read_text())
        result = Result(
            run=_run(content["run"]),
            gpus=count(content, "gpus", 1),
            density=number(content, "density"),
            recipe=Recipe(**content["recipe"]),
            summary=_summary(content["summary"]),
            held_out=[_evaluation(row) for row in content["held_out"]],
            by_position=[_position(row) for row in content["by_position"]],
            # files from before these were measured lack them
            counts_exactly=content.get("counts_exactly", True),
            shared_gpu=content.get("shared_gpu", False),
            device=content.get("environment", {}).get("device"),
            settings=_settings(content.get("settings", ())),
            texts=content.get("texts") and dict(content["texts"]),
            recall=tuple(Recall(**one) for one in content.get("recall", ())),
        )
        _ = result.loss, result.by_position[-1]  # raise an error if there is none
    _check_run(path, result.run)
    return _with_needles(folders, _with_probes(folders, result))


def _with_probes(folders: Folders, result: Result) -> Result:
    path = folders.probes(result.run)
    if not path.exists():
        return result
    with naming(path):
        content = _probes(json.loads(path.read_text()))
        checkpoint = Path(content.get("checkpoint", folders.run(result.run)))
    if result.run.name not in checkpoint.parts:
        raise ConfigError("root", path, f"holds the probes of {checkpoint}", "Move the file away")
    return replace(result, probes=content)


def _with_needles(folders: Folders, result: Result) -> Result:
    path = folders.needles(result.run)
    if not path.exists():
        return result
    with naming(path):
        content = json.loads(path.read_text())
        run = _run(content.get("run", asdict(result.run)))
        result = replace(result, needles=_needle_scores(content), needle_settings=needle_settings(content))
    if run != result.run:
        raise ConfigError("root", path, f"holds the needles of {run.name}", "Move the file away")
    return result


def _probes(content: dict[str, Any]) -> dict[str, Any]:
    """Check that probes hold what the report reads."""
    for row in content["completion"]:
        count(row, "length")
        for condition in ("with_definition", "without_definition"):
            _score(row[condition])
    for row in content["recurrence"]["by_distance"]:
        _ = count(row, "from"), count(row, "count", 1), number(row, "second_loss"), number(row, "first_loss")
    return content


def _needle_scores(content: dict[str, Any]) -> dict[tuple[str, int], Score]:
    scores = dict[tuple[str, int], Score]()
    for task, found in content["tasks"].items():
        for cell in found["cells"]:
            key = task, cell["length"]
            scores[key] = scores.get(key, Score(0, 0)) + _score(cell)
    return scores


def _score(content: Mapping[str, Any]) -> Score:
    trials = count(content, "trials", 1)
    return Score(count(content, "correct", most=trials), trials)


def _run(content: Mapping[str, Any]) -> Run:
    count(content, "seed")
    return Run(**content)


def _settings(words: Sequence[str]) -> tuple[str, ...]:
    if wrong := [word for word in words if "=" not in word]:
        raise ValueError(f"settings hold {wrong[0]!r}")
    return tuple(words)


def _summary(content: Mapping[str, Any]) -> Summary:
    _ = number(content, "tokens_per_s", 0), number(content, "peak_memory_gib")
    return Summary(**content)


def _evaluation(row: Sequence[Any]) -> tuple[int, float, float]:
    named = dict(zip(("tokens", "seconds", "loss"), row, strict=True))
    return count(named, "tokens"), number(named, "seconds"), number(named, "loss")


def _position(row: Sequence[Any]) -> tuple[int, int, float | None]:
    named = dict(zip(("first position", "last position", "loss"), row, strict=True))
    loss = None if named["loss"] is None else number(named, "loss")
    return count(named, "first position"), count(named, "last position"), loss
