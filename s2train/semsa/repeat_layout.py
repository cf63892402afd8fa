"""Repeats a chosen layout's rules in the sizes of a larger model.

It makes a layout to measure speed with: a mixture of rules that was chosen for one model, in the sizes of another. It
is not a layout chosen for that model. Layer l of L takes the rules of layer floor(l L' / L), KV head g those of KV head
g mod G', and the query heads of a KV head repeat those of the smaller model's. So that the density stays the same at
other lengths, each rule takes the form that grows in proportion, and keeps at the longest of --lengths what it kept at
--length tokens: windows and spans become a span of one block and a share of the length, columns and stripes become
stripes without a wider window.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace

from s2train.attention.hybrid import HybridLayout
from s2train.command_line.program import run_command, settings_before_options
from s2train.config import LayoutConfig, ModelConfig
from s2train.costs.attention import density
from s2train.errors import ConfigError
from s2train.files import check_output
from s2train.layouts.counting import kept_share
from s2train.layouts.patterns import GlobalBlocks, LocalVertical, SlidingWindow, Span
from s2train.layouts.patterns.base import Pattern
from s2train.layouts.patterns.dense import Dense
from s2train.planning import compose_run, hybrid_layout
from s2train.semsa.layouts import named_heads, write_layout
from s2train.semsa.rules import pattern_of

_PROGRAM = "s2train.semsa.repeat_layout"
_BISECTIONS = 24


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {_PROGRAM}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides", nargs="+", help="the larger model: settings of launch/pretrain.py, such as +model=7b_dense"
    )
    parser.add_argument("--layout", required=True, help="file of launch/choose_layout.py")
    parser.add_argument("--kv-heads", type=int, required=True, help="of the smaller model, which it was chosen for")
    parser.add_argument(
        "--length", type=int, required=True, help="tokens at which it was chosen: `lengths` of launch/choose_layout.py"
    )
    parser.add_argument(
        "--block-size", type=int, default=None, help="tokens; a multiple of the layout's own, the default"
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        default=[8192, 32768, 131072],
        help="tokens; the layout is as dense at the longest as the chosen one at --length; default: 8192 32768 131072",
    )
    parser.add_argument("--output", required=True, help="layout file to write")
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(settings_before_options(given))
    if min(args.kv_heads, args.length, *args.lengths) < 1:
        parser.error("--kv-heads, --length and --lengths must be at least 1")
    try:
        output = check_output(args.output, overwrite=None, such="runs/semsa/7b.yaml")
        cfg = compose_run([*args.overrides, f"layout=file:{args.layout}"])
        cfg.layout = repeat_layout(
            cfg.layout, args.kv_heads, cfg.model, args.length, max(args.lengths), args.block_size
        )
        hybrid = hybrid_layout(cfg)
    except ConfigError as error:
        parser.error(str(error))
    densities = _densities(hybrid, args.lengths)
    print("\n".join(densities))
    comment = [f"The rules of {args.layout}, repeated for the sizes of {cfg.model.name}: to measure speed.", *densities]
    write_layout(output, cfg.layout, [*comment, shlex.join(["python", "-m", _PROGRAM, *given])])
    return 0


def repeat_layout(
    layout: LayoutConfig,
    kv_heads: int,
    model: ModelConfig,
    length: int,
    longest: int,
    block_size: int | None = None,
) -> LayoutConfig:
    """Return a larger model's layout with the rules of `layout`, repeated.

    Args:
        layout: of kind per_head.
        kv_heads: of the model of `layout`.
        model: the larger one.
        length: tokens that the rules were chosen for.
        longest: tokens at which the new rules are as dense as the chosen ones at `length`.
        block_size: tokens, of the larger model's layout. None: the layout's own.
    Raises:
        ConfigError: not a layout of named heads, heads that KV heads can't share, or a rule that can't grow.
    """
    pattern, size = layout.pattern, block_size or layout.block_size
    if pattern.kind != "per_head":
        problem = "names no rule for each head"
        raise ConfigError("layout.pattern.kind", pattern.kind, problem, "Name a file of launch/choose_layout.py.")
    heads = len(pattern.heads[0])
    if heads % kv_heads:
        raise ConfigError("--kv-heads", kv_heads, f"doesn't divide the layout's {heads} heads", "Set a divisor.")
    if size % layout.block_size:
        problem = f"is no multiple of the layout's {layout.block_size}"
        raise ConfigError("--block-size", size, problem, f"Set {layout.block_size} or {2 * layout.block_size}.")
    own, larger = heads // kv_heads, model.num_attention_heads // model.num_query_groups
    rows: list[list[int]] = []
    for layer in range(model.num_layers):
        row = pattern.heads[layer * len(pattern.heads) // model.num_layers]
        places = [divmod(head, larger) for head in range(model.num_attention_heads)]
        rows.append([row[group % kv_heads * own + member % own] for group, member in places])
    rules = {
        rule: grown(pattern_of(pattern.rules[rule]), layout.block_size, length, size, longest)
        for rule in {rule for row in rows for rule in row}
    }
    repeated = named_heads([[rules[rule] for rule in row] for row in rows])
    return replace(layout, layers="S", block_size=size, pattern=repeated)


def grown(pattern: Pattern, block_size: int, length: int, new_size: int, longest: int) -> Pattern:
    """Return a rule of about the same density at any length.

    At `longest` tokens it is as dense as `pattern` is at `length`: a span of one block and a share of the length in
    place of a window or a span, stripes in place of columns or stripes.

    Args:
        new_size: tokens of the blocks of the new rule; `block_size` are those of `pattern`.
    Raises:
        ConfigError: a rule of another kind.
    """
    share = kept_share(pattern, block_size, length)
    if share == 1:
        return Dense()
    sinks = -(-getattr(pattern, "sinks", 0) * block_size // new_size)
    if isinstance(pattern, Span | SlidingWindow):
        low, high = 0.0, 1.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            is_below = kept_share(Span(1, middle, sinks), new_size, longest) <= share
            low, high = (middle, high) if is_below else (low, middle)
        return Span(1, math.floor(low * 1e4) / 1e4, sinks)
    if isinstance(pattern, LocalVertical | GlobalBlocks):
        # columns begin where the last one was, so that heads with other columns differ
        offset = pattern.offset if isinstance(pattern, LocalVertical) else max(pattern.blocks, default=0)
        widest = min(math.ceil(2 / share), -(-longest // new_size))
        stripes = [LocalVertical(1, stride, offset, sinks) for stride in range(1, widest + 1)]
        return min(stripes, key=lambda own: abs(kept_share(own, new_size, longest) - share))
    remedy = "Choose the layout among spans, windows, stripes and columns."
    raise ConfigError("layout.pattern.rules", pattern.form(), "can't be grown with the length", remedy)


def _densities(hybrid: HybridLayout, lengths: Sequence[int]) -> list[str]:
    return [f"density {density(hybrid, length):.4f} at {length:,} tokens" for length in lengths]


if __name__ == "__main__":
    run_command(lambda: sys.exit(main()))
