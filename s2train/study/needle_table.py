"""Tabulates how many needles runs find after training on needle documents."""

from collections.abc import Sequence

from s2train.needles.scores import Score
from s2train.study.comparison import Group
from s2train.study.protocol import differences
from s2train.study.tables import millions, recipes, spread, table
from s2train.study.variants import PHASES


def needle_section(name: str, own: Sequence[Group]) -> str:
    """Format a phase of needle documents as Markdown."""
    phase = PHASES[name]
    scores = [needle_scores(group) for group in own]
    columns = sorted({column for found in scores for column in found})
    heads = ["variant", "seeds", "density", *(f"{task} at {length:,}" for task, length in columns), "held-out loss"]
    rows = []
    for group, found in zip(own, scores, strict=True):
        cells = [_cell(found[column]) if column in found else "" for column in columns]
        rows.append(
            [group.variant, str(len(group.results)), f"{group.results[0].density:.4f}", *cells, spread(group.losses)]
        )
    results = [result for group in own for result in group.results]
    said = recipes((result.recipe for result in results), phase.lr_factor)
    asked = {result.run.name: result.needle_settings for result in results if result.needle_settings is not None}
    differ = differences(asked)
    return "\n".join(
        [
            f"## {phase.title}\n",
            f"The weights of phase {phase.after}, trained for {millions(phase.tokens)} tokens on documents full of",
            f"needles; {said}.",
            "Exact answers to held-out needles, over all depths asked for [95 % interval].",
            *([f"Needles differ in {', '.join(differ)}, and are not comparable."] if differ else []),
            "The held-out loss is that on the corpus, of which these documents have nothing.\n",
            table(heads, rows),
        ]
    )


def needle_scores(group: Group) -> dict[tuple[str, int], Score]:
    """Scores by task and length, over all depths and seeds."""
    scores = dict[tuple[str, int], Score]()
    for result in group.results:
        for key, score in (result.needles or {}).items():
            scores[key] = scores.get(key, Score(0, 0)) + score
    return scores


def _cell(score: Score) -> str:
    low, high = score.interval
    return f"{score.share:.0%} [{low:.0%}, {high:.0%}]"
