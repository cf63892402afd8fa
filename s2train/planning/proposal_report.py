"""Formats the divisions that a search found, and why others lose.

The best division comes first.
"""

from collections.abc import Sequence

from s2train.costs.memory import GIB
from s2train.costs.step_time import StepTime
from s2train.planning.advice import ROOM
from s2train.planning.division import Candidate, Search
from s2train.planning.numbers import time_text, with_unit
from s2train.planning.report import basis
from s2train.planning.targets import rates_basis

_SHOWN, _SHOWN_TOO_LARGE = 10, 5  # divisions
_NOTABLE = 0.2  # least share of a difference to be named
# What a step's parts are called where two divisions are compared.
_CAUSES = {
    "communication": "communication",
    "pipeline": "bubble",
    "recomputation": "recompute",
    "optimizer": "optimizer",
}
_COLUMNS = f"{'tp':>4}{'pp':>4}{'cp':>4}{'dp':>5}{'micro':>7}  {'recompute':<10}{'step':>9}{'GiB':>7}"


def format_proposal(found: Search) -> str:
    """Format a search: its divisions, and the settings to paste.

    It shows the best divisions, and faster ones that are too large.
    """
    cfg, best = found.cfg, found.fitting[0]
    planned = len(found.fitting) + len(found.too_large)
    lines = [
        f"{cfg.model.name} on {found.gpus} × {found.hardware.name}, {cfg.train.global_batch_size} × "
        f"{cfg.train.seq_length:,} tokens a step: {len(found.fitting)} of {planned} planned settings fit into "
        f"{found.room / GIB:.1f} GiB, {ROOM:.0%} of a GPU's memory",
        "",
        f"{_COLUMNS}{'tokens/s':>10}{'MFU':>7}  slower than the first by",
    ]
    shown = _best_of_divisions(found.fitting)
    for candidate in shown[:_SHOWN]:
        rate = f"{with_unit(candidate.prediction.tokens_per_s):>10}{candidate.prediction.mfu:>7.1%}"
        lines.append(f"{_row(candidate)}{rate}  {why_slower(candidate, best)}".rstrip())
    if len(shown) > _SHOWN:
        lines.append(f"and {len(shown) - _SHOWN} slower divisions")
    lines += [*_too_large(found), *_rejected(found), ""]
    lines += [f"rates: {rates_basis(found.hardware)}", f"times: {basis(best.prediction)}"]
    if best.prediction.slow_host_s is not None:
        lines.append("host: a layer takes so little time that a slow host may launch it later than predicted")
    lines.append(f"To use the first, add: {' '.join(best.settings)}")
    return "\n".join(lines)


def why_slower(candidate: Candidate, best: Candidate) -> str:
    """Name the step's parts in which a division differs from the best.

    The result is empty for the best itself.
    """
    if candidate is best:
        return ""
    differences = {
        name: _by_cause(candidate.prediction.time)[name] - seconds
        for name, seconds in _by_cause(best.prediction.time).items()
    }
    largest = max(differences.values())
    named = sorted(differences.items(), key=lambda part: -part[1])
    parts = [f"{name} {_signed(more)}" for name, more in named if abs(more) >= _NOTABLE * largest]
    return f"{time_text(candidate.seconds - best.seconds)}: {', '.join(parts)}"


def _by_cause(time: StepTime) -> dict[str, float]:
    """Sum a step's parts by what users can change.

    The part `compute` is computation that a division slows or spreads unevenly.
    """
    found = dict.fromkeys(("compute", *_CAUSES.values()), 0.0)
    for name, seconds in time.parts().items():
        found[_CAUSES.get(name, "compute")] += seconds
    return found


def _best_of_divisions(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Keep the fastest settings of each tp, pp and cp."""
    kept: dict[tuple[int, int, int], Candidate] = {}
    for candidate in candidates:
        kept.setdefault(candidate.sizes, candidate)
    return list(kept.values())


def _too_large(found: Search) -> list[str]:
    """Format settings and divisions that are too large.

    The settings would be faster than the first; the divisions don't fit with any settings.
    """
    best = found.fitting[0]
    lines = []
    faster = [candidate for candidate in found.too_large if candidate.seconds < best.seconds]
    if faster:
        # The ones that miss by least: they say which memory would pay.
        near = sorted(faster, key=lambda candidate: candidate.memory.total)[:_SHOWN_TOO_LARGE]
        lines += ["", f"Faster, but out of memory ({len(faster)} settings; those that need least):", _COLUMNS]
        lines += [f"{_row(candidate)}  {_shortage(candidate, found)}" for candidate in near]
    fitting = {candidate.sizes for candidate in found.fitting}
    least: dict[tuple[int, int, int], Candidate] = {}
    for candidate in sorted(found.too_large, key=lambda candidate: candidate.memory.total):
        if candidate.sizes not in fitting:
            least.setdefault(candidate.sizes, candidate)
    if least:
        lines += ["", "Divisions that don't fit with any settings:", _COLUMNS]
        lines += [f"{_row(candidate)}  {_shortage(candidate, found)}" for candidate in least.values()]
    return lines


def _rejected(found: Search) -> list[str]:
    """Format why divisions can't be used, one example for each setting."""
    examples = {error.setting: error for error in reversed(found.rejected)}
    numbers = {name: sum(error.setting == name for error in found.rejected) for name in examples}
    lines = [
        f"  {numbers[name]} × {name}, such as {error.given}: {error.problem}"
        for name, error in sorted(examples.items(), key=lambda example: -numbers[example[0]])
    ]
    return ["", "Rejected, each way to recompute counted:", *lines] if lines else []


def _row(candidate: Candidate) -> str:
    tp, pp, cp = candidate.sizes
    train = candidate.cfg.train
    return (
        f"{tp:>4}{pp:>4}{cp:>4}{candidate.dp:>5}{train.micro_batch_size:>7}  {train.recompute:<10}"
        f"{time_text(candidate.seconds):>9}{candidate.memory.total / GIB:>7.1f}"
    )


def _shortage(candidate: Candidate, found: Search) -> str:
    return f"{(candidate.memory.total - found.room) / GIB:.1f} GiB too much"


def _signed(seconds: float) -> str:
    return f"{'-' if seconds < 0 else '+'}{time_text(abs(seconds))}"
