"""Writes the quality study's report from its result files."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from s2train.files import replacing
from s2train.study import speed
from s2train.study.comparison import Group, by_device, common_gpu_seconds, find_baseline, groups
from s2train.study.files import Folders
from s2train.study.guidelines import guidelines_section
from s2train.study.needle_table import needle_section
from s2train.study.picture import draw_by_position
from s2train.study.protocol import differences, probe_settings, rarest
from s2train.study.results import Result, read_results
from s2train.study.speed_picture import draw_by_speed, with_speed
from s2train.study.tables import UNKNOWN, millions, recipes, spread, table
from s2train.study.variants import PHASES, REHEARSAL, RUNS

NAME = "quality"  # of report and pictures
EARLY = 1024  # position after which the loss may still fall
_SHARED = re.compile(r"(model|optim)\.(?!name$|trunk)")  # settings that all runs of a phase have alike
RECALL_ROWS = 7  # steps in the table of recall


def write_report(folders: Folders) -> list[Path]:
    """Write ROOT/quality.md and its pictures.

    quality.png shows loss by position. quality-speed.png shows loss against throughput, if there is one. Phases of
    needle documents have a table alone.

    Raises:
        ConfigError: there are no results, or a file can't be read.
    """
    grouped = groups(read_results(folders), speed.read(folders))
    compared, on_needles = (
        {name: own for name, own in grouped.items() if PHASES[name].needles == needles} for needles in (False, True)
    )
    text, picture, by_speed = (folders.root / f"{NAME}{end}" for end in (".md", ".png", "-speed.png"))
    drawn = {picture: draw_by_position} if compared else {}
    if with_speed(compared):
        drawn[by_speed] = draw_by_speed
    for path in {picture, by_speed}.difference(drawn):
        path.unlink(missing_ok=True)  # of results that are gone
    for path, draw in drawn.items():
        draw(compared, path)
    with replacing(text) as temporary:
        temporary.write_text(report(compared, on_needles, picture.name, by_speed.name))
    return [text, *drawn]


def report(
    grouped: Mapping[str, Sequence[Group]], on_needles: Mapping[str, Sequence[Group]], picture: str, by_speed: str
) -> str:
    """Format the report as Markdown.

    Args:
        grouped: phases of which losses are compared.
        on_needles: phases of needle documents.
    """
    parts = ["# Quality study\n"]
    if with_speed(grouped):
        parts.append(
            f"![Held-out loss against tokens/s, a panel per phase]({by_speed})\n\n"
            "Points are means over the seeds, and bars span them. Hollow points have one seed.\n"
        )
    if lacking := _lacking_speed(grouped):
        parts.append(f"No throughput to compare was measured, and loss against tokens/s is not drawn: {lacking}.\n")
    if grouped:
        parts.append(
            f"![Held-out loss by position, a panel per phase]({picture})\n\n"
            "Losses by position are drawn less those of the dense run of the same seed. Bars span the seeds, and\n"
            "labels have the mean over all positions.\n"
        )
    parts += [_phase(name, own) for name, own in grouped.items()]
    parts += [needle_section(name, own) for name, own in on_needles.items()]
    parts.append(guidelines_section(grouped))
    everything = [*grouped.values(), *on_needles.values()]
    there = {result.run for own in everything for group in own for result in group.results}
    models = {PHASES[run.phase].model for run in there}
    planned = (run for run in (*RUNS, *REHEARSAL) if PHASES[run.phase].model in models)
    if missing := [run.name for run in planned if run not in there]:
        parts.append(f"Runs without a result: {', '.join(missing)}.\n")
    return "\n".join(parts)


def _lacking_speed(grouped: Mapping[str, Sequence[Group]]) -> str:
    """Name phases and variants without a throughput."""
    known, named = with_speed(grouped), []
    for name, own in grouped.items():
        lacking = [group.variant for group in own if group.tokens_per_s is None]
        if len(by_device(own)) > 1:
            named.append(f"phase {name}, timed on several GPU models")
        elif lacking:
            named.append(f"phase {name}{': ' + ', '.join(lacking) if name in known else ''}")
    return "; ".join(named)


def _phase(name: str, own: Sequence[Group]) -> str:
    phase = PHASES[name]
    seconds, baseline = common_gpu_seconds(own), find_baseline(own)
    lengths = sorted({length for group in own for length in group.completions()})
    distances = sorted({start for group in own for start in group.recurrences()})
    heads = [
        "variant", "seeds", "GPUs", "density", "held-out loss", "less dense’s",
        "at equal GPU time" if seconds is None else f"at {seconds:,.0f} GPU-s",
        "tokens/s per GPU", "MFU",
        "peak GiB",
        *(f"completed at {length:,} (without)" for length in lengths),
        *(f"second occurrence from {start:,} (first)" for start in distances),
    ]  # fmt: skip
    rows = [_row(group, baseline, seconds, lengths, distances) for group in own]
    heads_by_position, positions = _by_position(own)
    said = recipes((result.recipe for group in own for result in group.results), phase.lr_factor)
    if phase.is_after_decay:
        said += f". All steps are at the learning rate's lowest value, to which phase {phase.after} has decayed it"
    is_shared = any(result.shared_gpu for group in own for result in group.results)
    shared = [
        "GPU time, tokens/s and MFU of runs that shared their GPU are those of first steps that had one alone;",
        f"{UNKNOWN} if none were measured.",
    ]
    where = "before its end" if phase.is_after_decay else "in the middle of its learning-rate schedule"
    timed = [f"At equal GPU time, a run that takes longer is read {where}."]
    paired = ["Differences from dense are those between runs of one seed, which see the same data in the same order."]
    expected = ["Expected densities are of layers where the data choose."]
    return "\n".join(
        [
            f"## {phase.title}\n",
            f"{millions(phase.tokens)} tokens a run; {said}.",
            "Losses are in nats per token: mean [lowest, highest] over seeds.",
            *(paired if baseline is not None else []),
            *(timed if seconds is not None else []),
            "On several GPUs, GPU time, tokens/s and MFU include communication, and the optimizer's state is divided.",
            *(shared if is_shared else []),
            *_gpus(own),
            *_not_comparable(own),
            *(expected if not all(_is_exact(group) for group in own) else []),
            "Completed: share of identifiers [95 % interval], and in brackets the share without the definition.\n",
            table(heads, rows),
            "Held-out loss by position:\n",
            table(heads_by_position, positions),
            *_recalls(own),
        ]
    )


def _gpus(own: Sequence[Group]) -> list[str]:
    """Say which times are not compared, if the runs had different GPUs."""
    said = []
    if len({result.gpus for group in own for result in group.results}) > 1:
        alone = f"{own[0].gpus} GPU{'s' if own[0].gpus > 1 else ''}"
        said += [
            f"GPU time, tokens/s, MFU and peak GiB are those of {alone}: of other runs, those of first steps on",
            f"{alone}, or {UNKNOWN}.",
        ]
    if len(found := by_device(own)) > 1:
        named = "; ".join(f"{device}: {', '.join(variants)}" for device, variants in found.items())
        said.append(f"The runs were timed on several GPU models, so GPU time, tokens/s and MFU are left out ({named}).")
    return said


def _not_comparable(own: Sequence[Group]) -> list[str]:
    """Say which losses and probes are not comparable.

    They are of different recipes, models or texts. Results of several roots may be joined.
    """
    results, said = [result for group in own for result in group.results], list[str]()
    for what, of_result in (("recipes", _recipe), ("models or optimizers", _model)):
        if (other := rarest({result.run.name: of_result(result) for result in results})) is not None:
            said.append(f"Runs have several {what}, and are not comparable ({other[0]}: {', '.join(other[1])}).")
    counts = {count for result in results if (count := result.summary.held_out_tokens) is not None}
    if len(counts) > 1:
        sizes = ", ".join(f"{count:,}" for count in sorted(counts))
        said.append(f"Held-out losses are over different numbers of tokens ({sizes}), and not comparable.")
    texts = {tuple(sorted(result.texts.items())) for result in results if result.texts}
    if len(texts) > 1:
        said.append("Held-out losses are of runs on several texts or tokenizers, and not comparable.")
    probes = [result.probes for result in results if result.probes]
    if len({(one.get("text", {}).get("sha256"), one.get("tokenizer")) for one in probes}) > 1:
        said.append("Probes are of several texts or tokenizers, and not comparable.")
    asked = {result.run.name: probe_settings(result.probes) for result in results if result.probes}
    if found := differences(asked):
        said.append(f"Probes differ in {', '.join(found)}, and are not comparable.")
    return said


def _recipe(result: Result) -> str:
    return recipes([result.recipe], 1.0)


def _model(result: Result) -> str:
    """Settings of model and optimizer that the runs of a phase share."""
    words = dict(word.split("=", 1) for word in result.settings)  # a later word replaces an earlier one
    return " ".join(f"{name}={value}" for name, value in sorted(words.items()) if _SHARED.match(name))


def _by_position(own: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of losses by position.

    The last column has how much the loss still changes after position `EARLY`.
    """
    ranges = list(own[0].by_position())
    last_start, _ = ranges[-1]
    has_change = last_start >= EARLY and any(stop == EARLY for _, stop in ranges)
    heads = ["variant", *(f"{start:,}-{stop:,}" for start, stop in ranges)]
    rows = [[group.variant, *(spread(losses) for losses in group.by_position().values())] for group in own]
    if has_change:
        heads.append(f"last less that up to {EARLY:,}")
        for row, group in zip(rows, own, strict=True):
            row.append(spread(group.changes(EARLY), "+"))
    return heads, rows


def _recalls(own: Sequence[Group]) -> list[str]:
    """Table of recall over training; nothing without selected blocks."""
    curves = {group.variant: recalls for group in own if (recalls := group.recalls())}
    steps = sorted({step for recalls in curves.values() for step in recalls})
    if not steps:
        return []
    count = min(RECALL_ROWS, len(steps))
    shown = [steps[-(-len(steps) * number // count) - 1] for number in range(1, count + 1)]
    rows = [
        [f"{step:,}", *(_recall(recalls[step]) if step in recalls else "" for recalls in curves.values())]
        for step in shown
    ]
    return [
        "Recall, the share of dense attention's probability that lies in the selected blocks: mean over layers and",
        "seeds [lowest, highest layer], by steps of training:\n",
        table(["step", *curves], rows),
    ]


def _recall(values: tuple[float, float, float]) -> str:
    middle, low, high = values
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def _is_exact(group: Group) -> bool:
    return all(result.counts_exactly for result in group.results)


def _row(
    group: Group, baseline: Group | None, seconds: float | None, lengths: Sequence[int], distances: Sequence[int]
) -> list[str]:
    completions, recurrences = group.completions(), group.recurrences()
    row = [
        group.variant,
        str(len(group.results)),
        ", ".join(str(gpus) for gpus in sorted({result.gpus for result in group.results})),
        f"{group.results[0].density:.4f}{'' if _is_exact(group) else ' expected'}",
        spread(group.losses),
        _differences(group, baseline),
        spread([] if seconds is None else group.losses_at(seconds)),
        UNKNOWN if group.tokens_per_s is None else f"{group.tokens_per_s:,.0f}",
        UNKNOWN if group.mfu is None else f"{group.mfu:.1%}",
        UNKNOWN if group.memory is None else f"{group.memory:.1f}",
    ]
    for length in lengths:
        if length not in completions:
            row.append("")
            continue
        share, (low, high), without = completions[length]
        row.append(f"{share:.0%} [{low:.0%}, {high:.0%}] ({without:.0%})")
    for start in distances:
        if start not in recurrences:
            row.append("")
            continue
        count, second, first = recurrences[start]
        row.append(f"{second:.3f} ({first:.3f}), n={count}")
    return row


def _differences(group: Group, baseline: Group | None) -> str:
    """Format losses less the baseline's, over the seeds that both have."""
    if group is baseline:
        return ""
    return spread([own.loss - dense.loss for own, dense in group.paired(baseline)] if baseline else [], "+")
