"""Compares estimated effects with the loss under real masks.

A mask removes a single block from a query block, or what a rule drops from a head.
"""

import itertools
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from rich import box
from rich.console import Console
from rich.table import Table

from s2train.environment.provenance import environment
from s2train.files import write_json
from s2train.kernels.block_statistics.effects import SUMS
from s2train.pictures.png import write_png
from s2train.pictures.style import GREY, SPARSE, Sheet, plain
from s2train.semsa.accumulation import Accumulator
from s2train.semsa.calibration import DATA, Labels, Sample, label_seed, samples, token_losses
from s2train.semsa.config import ProfileAttentionConfig
from s2train.semsa.measuring import loss_with_head_masked, summed_loss
from s2train.semsa.profile import group_size
from s2train.semsa.profile_request import Request
from s2train.semsa.rules import keeps

EDGES = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0)  # of the block's mean probability in its rows
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
_LEAST = 1e-4  # blocks of less probability change the loss by less than its rounding


@dataclass(frozen=True)
class Case:
    """One mask of a head, with its measured and estimated effects.

    It removes block `key` from block `query`, or what `rule` drops.

    Attributes:
        mass: mean probability per row that the mask removes.
        change: of the loss summed over the samples, in nats; measured.
        estimates: of the same, by name of the estimate.
    """

    layer: int
    head: int
    mass: float
    change: float
    estimates: dict[str, float]
    query: int | None = None
    key: int | None = None
    rule: int | None = None


def verify(
    cfg: ProfileAttentionConfig,
    request: Request,
    model: torch.nn.Module,
    sums: Accumulator,
    device: torch.device,
    output: Path,
) -> None:
    """Mask `cfg.verify` blocks and rules one at a time; collective.

    Print the results, and write them as JSON and PNG.
    """
    texts = list(samples(request.subject, cfg.verify_samples, held_out=False))
    vocabulary = request.subject.tokenizer.vocab_size
    # the estimates are of the very samples that are masked: what is left is the estimate's own error
    estimated: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for labels in (DATA, *(Labels("sampled", temperature) for temperature in TEMPERATURES)):
        sums.clear()
        for number, sample in enumerate(texts):
            seed = label_seed(cfg.seed, number)
            losses = token_losses(model, sample, device, labels, vocab_size=vocabulary, seed=seed)
            losses.double().sum().backward()
        # every data parallel rank holds all texts
        blocks, rules = sums.sums(parallel_state.get_data_parallel_group())
        ranks = parallel_state.get_data_parallel_world_size()
        estimated[str(labels)] = blocks / ranks, rules / ranks
    of_blocks = _blocks(cfg, request, model, estimated, texts, device)
    of_rules = _rules(cfg, request, model, estimated, texts, device)
    if torch.distributed.get_rank() == 0:
        content = {
            "checkpoint": str(request.subject.checkpoint),
            "samples": cfg.verify_samples,
            "command": shlex.join(sys.argv),
            "environment": environment(),
            "correlations": {"blocks": correlations(of_blocks), "rules": correlations(of_rules)},
            "error_by_mass": error_by_mass(of_blocks),
            "blocks": [asdict(case) for case in of_blocks],
            "rules": [asdict(case) for case in of_rules],
        }
        draw(output.with_suffix(".png"), of_blocks, of_rules, request.subject.trained.model.name)
        write_json(output, content)  # last: with it the verification is complete
        Console(soft_wrap=True, width=120).print(*_tables(content))
        print(f"verification {output} and {output.with_suffix('.png')}", flush=True)


def _blocks(
    cfg: ProfileAttentionConfig,
    request: Request,
    model: torch.nn.Module,
    estimated: dict[str, tuple[np.ndarray, np.ndarray]],
    texts: Sequence[Sample],
    device: torch.device,
) -> list[Case]:
    """Mask blocks before the diagonal.

    About equal numbers of them come from each range of probability.
    """
    signed = estimated["data"][0]
    n, size = signed.shape[-1], request.block_size
    rows = np.full(n, size)
    rows[-1] = request.subject.cfg.train.seq_length - (n - 1) * size
    mass = signed[SUMS.index("mass")] / (rows[:, None] * len(texts))
    rng = np.random.default_rng(cfg.seed)
    far = np.tri(n, k=-1, dtype=bool)
    places: list[tuple[int, ...]] = []
    for low, high in zip((_LEAST, *EDGES[1:-1]), EDGES[1:], strict=True):
        found = np.argwhere(far & (mass > low) & (mass <= high))
        places += [tuple(map(int, place)) for place in rng.permutation(found)[: -(-cfg.verify // (len(EDGES) - 1))]]
    chosen = places[: cfg.verify]

    def kept(place: tuple[int, ...]) -> torch.Tensor:
        blocks = torch.ones(n, n, dtype=torch.bool).tril()
        blocks[place[2], place[3]] = False
        return blocks

    changes = _changes(model, [(place[0], place[1], kept(place)) for place in chosen], texts, device)
    return [
        Case(
            place[0],
            place[1],
            float(mass[place]),
            change,
            _estimates(estimated, 0, place),
            query=place[2],
            key=place[3],
        )
        for place, change in zip(chosen, changes, strict=True)
    ]


def _rules(
    cfg: ProfileAttentionConfig,
    request: Request,
    model: torch.nn.Module,
    estimated: dict[str, tuple[np.ndarray, np.ndarray]],
    texts: Sequence[Sample],
    device: torch.device,
) -> list[Case]:
    """Mask heads by rules that drop something, at random."""
    of_rules = {name: (blocks, rules.sum(-1)) for name, (blocks, rules) in estimated.items()}
    dropped = of_rules["data"][1][SUMS.index("mass")] / (request.subject.cfg.train.seq_length * len(texts))
    found = np.argwhere(dropped > _LEAST)
    chosen = [tuple(map(int, place)) for place in np.random.default_rng(cfg.seed + 1).permutation(found)[: cfg.verify]]
    n = estimated["data"][1].shape[-1]

    def kept(place: tuple[int, ...]) -> torch.Tensor:
        layer, head, rule = place
        columns = () if request.columns is None else request.columns[layer, head].tolist()
        return keeps(request.rules[rule].of_group(head // group_size(request.subject.trained.model), columns), n)

    changes = _changes(model, [(place[0], place[1], kept(place)) for place in chosen], texts, device)
    return [
        Case(place[0], place[1], float(dropped[place]), change, _estimates(of_rules, 1, place), rule=place[2])
        for place, change in zip(chosen, changes, strict=True)
    ]


def _estimates(
    estimated: dict[str, tuple[np.ndarray, np.ndarray]], part: int, place: tuple[int, ...]
) -> dict[str, float]:
    found = {
        f"{'½ ' if name == 'squared' else ''}{name}, {labels}": float(sums[part][SUMS.index(name)][place])
        / (2 if name == "squared" else 1)
        for labels, sums in estimated.items()
        for name in (("signed", "absolute", "squared") if labels == "data" else ("squared",))
    }
    return found | {"mass": float(estimated["data"][part][SUMS.index("mass")][place])}


def _changes(
    model: torch.nn.Module,
    masks: Sequence[tuple[int, int, torch.Tensor]],
    texts: Sequence[Sample],
    device: torch.device,
) -> list[float]:
    """Measure the change of the summed loss under each mask.

    Data parallel ranks divide the masks among them.
    """
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    changes = torch.zeros(len(masks), dtype=torch.float64, device=device)
    base = summed_loss(model, texts, device)
    for number in range(rank, len(masks), ranks):
        changes[number] = loss_with_head_masked(model, *masks[number], texts, device) - base
    torch.distributed.all_reduce(changes, group=parallel_state.get_data_parallel_group())
    return [float(change) for change in changes]


def correlations(cases: Sequence[Case]) -> dict[str, float | None]:
    """Return each estimate's rank correlation (Spearman's) with the measured change.

    None where it is undefined.
    """
    if len(cases) < 3:
        return {}
    true = np.array([case.change for case in cases])
    return {name: spearman(np.array([case.estimates[name] for case in cases]), true) for name in cases[0].estimates}


def spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    """Return the correlation of ranks, or None if it is undefined.

    Ties share their mean rank. It is undefined if all values on one side are equal.
    """
    ranks = []
    for values in (first, second):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count + 1) / 2)[place])
    if any(rank.std() == 0 for rank in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def error_by_mass(cases: Sequence[Case]) -> list[dict[str, float | None]]:
    """Return the first-order estimate's error by ranges of the removed probability."""
    rows: list[dict[str, float | None]] = []
    for low, high in itertools.pairwise(EDGES):
        own = [case for case in cases if low < case.mass <= high]
        if not own:
            continue
        true = np.array([case.change for case in own])
        estimate = np.array([case.estimates["signed, data"] for case in own])
        row: dict[str, float | None] = {
            "from": low,
            "to": high,
            "count": len(own),
            "median_change": float(np.median(np.abs(true))),
        }
        error = float(np.abs(estimate - true).sum() / np.abs(true).sum()) if true.any() else None
        rows.append(row | {"relative_error": error, "spearman": spearman(estimate, true) if len(own) > 2 else None})
    return rows


def _tables(content: dict[str, Any]) -> list[Table]:
    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "title_justify": "left", "title_style": "bold"}
    ranks = Table(title="Rank correlation of estimates with the measured change of the loss", **style)
    for name in ("estimate", "blocks", "rules"):
        ranks.add_column(name, justify="left" if name == "estimate" else "right")
    found = content["correlations"]
    for name in found["rules"] or found["blocks"]:
        ranks.add_row(name, *(_number(found[part].get(name), ".3f") for part in ("blocks", "rules")))
    error = Table(title="First-order estimate (data labels) of single blocks, by their probability", **style)
    for name in ("probability", "blocks", "Σ|error| / Σ|true|", "rank correlation", "median |ΔL| (nats)"):
        error.add_column(name, justify="right")
    for row in content["error_by_mass"]:
        values = (_number(row["relative_error"], ".3f"), _number(row["spearman"], ".3f"))
        error.add_row(f"{row['from']:g} to {row['to']:g}", str(row["count"]), *values, f"{row['median_change']:.2g}")
    return [ranks, error]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def draw(path: Path, blocks: Sequence[Case], rules: Sequence[Case], title: str) -> None:
    """Draw errors of blocks, and measured over estimated changes of rules.

    The errors are drawn over the removed probability.
    """
    sheet = Sheet(10.0, 4.3)
    sheet.text(0.45, 0.2, f"{title}: estimated and measured effect of masks", size=12, bold=True)
    axes = sheet.axes(0.85, 0.85, 3.9, 2.9)
    mass = [case.mass for case in blocks]
    error = [abs(case.estimates["signed, data"] - case.change) / max(abs(case.change), 1e-12) for case in blocks]
    axes.loglog(mass, error, "o", markersize=3, color=SPARSE[0], alpha=0.6)
    axes.set_xlabel("probability of the block, mean of its rows", fontsize=8.5, color=GREY)
    axes.set_ylabel("|first-order estimate − true| / |true|", fontsize=8.5, color=GREY)
    plain(axes, 8)
    axes = sheet.axes(5.7, 0.85, 3.9, 2.9)
    for number, name in enumerate(("½ squared, sampled, temperature 4", "signed, data")):
        points = [(abs(case.estimates[name]), abs(case.change)) for case in rules]
        kept = [(x, y) for x, y in points if x > 0 and y > 0]
        if kept:
            axes.loglog(*zip(*kept, strict=True), "o", markersize=3, color=SPARSE[number], alpha=0.6, label=name)
    axes.set_xlabel("|estimated| change by a rule of one head (nats)", fontsize=8.5, color=GREY)
    axes.set_ylabel("|measured| change (nats)", fontsize=8.5, color=GREY)
    axes.legend(frameon=False, fontsize=7.5)
    plain(axes, 8)
    write_png(sheet.figure, path)
