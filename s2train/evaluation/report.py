"""Formats an evaluation's results for a terminal, and logs them to wandb."""

from pathlib import Path
from typing import Any

from s2train.checkpoints.training_run import training_run
from s2train.config import PretrainConfig
from s2train.evaluation.tasks import metrics


def report(content: dict[str, Any]) -> str:
    """Format results: a few lines per text, one per task metric."""
    lines = []
    for text in content["texts"]:
        per_byte = "" if text["bits_per_byte"] is None else f", {text['bits_per_byte']:.4f} bits per byte"
        lines.append(
            f"{text['file']}: loss {text['loss']:.4f}, perplexity {text['perplexity']:.3f},"
            f" accuracy {text['accuracy']:.4f}{per_byte}"
            f" ({text['tokens']:,} tokens of {text['documents']:,} document{'s' if text['documents'] != 1 else ''},"
            f" {content['windows']} windows of {content['length']:,})"
        )
        lines += [
            f"  positions {first:>7,} to {stop:>7,}: loss {'none' if loss is None else f'{loss:.4f}'}"
            for first, stop, loss in text["by_position"]
        ]
    for task, found in metrics(content["tasks"]).items():
        lines += [f"{task}: {name} {value:.4f}" for name, value in found.items()]
    return "\n".join(lines)


def figures(content: dict[str, Any]) -> dict[str, float]:
    """Return the figures of texts and tasks for wandb.

    Those of texts are named `evaluation/NAME/loss` and so on, by their files' names; those of tasks are their metrics.
    """
    found: dict[str, float] = {}
    names = [Path(text["file"]).stem for text in content["texts"]]
    for name, text in zip(names, content["texts"], strict=True):
        own = name if names.count(name) == 1 else text["file"]
        for figure in ("loss", "perplexity", "bits_per_byte", "accuracy", "short", "long"):
            if text[figure] is not None:
                found[f"evaluation/{own}/{figure}"] = text[figure]
    for task, own in metrics(content["tasks"]).items():
        found |= {f"evaluation/{task}/{name}": value for name, value in own.items()}
    return found


def log_figures(content: dict[str, Any], checkpoint: Path, trained: PretrainConfig, mode: str) -> str:
    """Log the figures to the training's wandb run at the checkpoint's step.

    Args:
        mode: offline or online.
    Returns:
        the run's ID.
    """
    run, place = training_run(checkpoint, trained, mode)
    run.log({**figures(content), **place})
    run.close()
    return run.id
