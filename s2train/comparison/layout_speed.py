"""Times the attention of a model's layouts beside dense attention.

It times core attention alone, as training calls it, and sums over layers. Queries, keys and values are random normal,
bfloat16, batch 1. Layers that keep the same blocks are timed once, whichever layout they are of, and each after it
agreed with the oracle over --check-length tokens. Dense attention (FlashAttention-2 and cuDNN of torch, and
FlashAttention-4 where it is installed) takes the same inputs, and counts once for each layer. Device times are medians
with the host ahead; compiling kernels and building schedules comes before. The JSON is written as results arrive; the
same command resumes from it.

Run it on one GPU: python -m s2train.comparison.layout_speed +model=7b_hybrid layout=file:X.yaml --output FILE.json
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from s2train.attention.hybrid import HybridLayout
from s2train.command_line.layout_files import PREFIX
from s2train.command_line.program import run_command, settings_before_options
from s2train.comparison.layer_speed import LayerTimer, Record, Sizes
from s2train.config import ParallelConfig, PretrainConfig, head_dim
from s2train.costs.attention import density
from s2train.environment.provenance import timed_on
from s2train.errors import ConfigError
from s2train.files import check_writable, write_json
from s2train.kernels.benchmarks.run import failures
from s2train.megatron.layout_cache import LayoutCache
from s2train.megatron.setup import initialize, shutdown
from s2train.planning import compose_run, hybrid_layout

PROGRAM = "comparison.layout_speed"
_FIGURES = {"forward_ms": "forward", "forward_backward_ms": "both"}  # of a row, and their names in `time_passes`

_SECONDS_UNWRITTEN = 5.0  # of layers whose row isn't there yet: writing takes as long as timing a small layer


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns 1 if something could not be timed.
    """
    parser = argparse.ArgumentParser(prog=f"python -m s2train.{PROGRAM}", description=__doc__)
    parser.add_argument("overrides", nargs="*", default=["+model=7b_hybrid"], help="overrides of launch/pretrain.py")
    parser.add_argument("--layouts", nargs="+", default=[], help="layout files, each in place of layout=file:…")
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[8192, 32768, 131072], help="default: 8192 32768 131072"
    )
    parser.add_argument("--budget-ms", type=float, default=500, help="device time of each measurement; default: 500")
    parser.add_argument("--check-length", type=int, default=2048, help="tokens compared with the oracle; default: 2048")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write, or to resume from")
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(settings_before_options(given))
    if min(*args.lengths, args.check_length) < 1 or args.budget_ms <= 0:
        parser.error("lengths, --check-length and --budget-ms must be above 0")
    try:
        runs = _runs(args.overrides, args.layouts)
        layouts = {name: _static_layout(cfg) for name, cfg in runs.items()}
        check_writable("--output", args.output.parent)
    except ConfigError as error:
        parser.error(str(error))
    found = _read(args.output, parser)
    cfg = next(iter(runs.values()))
    device = initialize(ParallelConfig(), cfg.seed)
    settings = {
        "model": cfg.model.name,
        "layers": cfg.model.num_layers,
        "heads": cfg.model.num_attention_heads,
        "kv_heads": cfg.model.num_query_groups,
        "head_dim": head_dim(cfg.model),
        "attention_backend": cfg.attention_backend,
        "dense_attention": cfg.dense_attention,
        "budget_ms": args.budget_ms,
        "check_length": args.check_length,
    }
    head = timed_on(PROGRAM, given, device)
    environment = {name: head.pop(name) for name in ("device", "versions")}
    data = _begun(args.output, found, {**head, "environment": environment, "settings": settings}, parser)
    sizes = Sizes(settings["heads"], settings["kv_heads"], settings["head_dim"])
    timer = LayerTimer(cfg, sizes, device, args.check_length, args.budget_ms)
    session = _Session(timer, data, args.output, cfg.model.num_layers)
    for length in args.lengths:
        session.time_dense(length)
        for name, hybrid in layouts.items():
            session.time_layout(name, hybrid, length)
    Console(width=160).print(_table(data))
    shutdown()
    return int(any("error" in record for record in (*data["rows"], *data["dense"])))


def _runs(overrides: Sequence[str], files: Sequence[str]) -> dict[str, PretrainConfig]:
    """Compose a run for each layout file.

    Without files, compose one with the overrides' own layout.

    Raises:
        ConfigError: two files have the same name, both options name layouts, or settings don't compose.
    """
    named = [word.partition("=")[2] for word in overrides if word.lstrip("+").startswith("layout=")]
    if named and files:
        remedy = "Name the file among --layouts alone."
        raise ConfigError("layout", named[-1], "--layouts names layouts too", remedy)
    if not files:
        name = Path(named[-1].removeprefix(PREFIX)).name if named else "the model's own"
        return {name: _composed(overrides)}
    names = [Path(file).name for file in files]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError("--layouts", twice[0], "two files have this name", "Rename one.")
    return {name: _composed([*overrides, f"layout={PREFIX}{file}"]) for name, file in zip(names, files, strict=True)}


def _composed(overrides: Sequence[str]) -> PretrainConfig:
    cfg = compose_run(overrides)
    cfg.parallel, cfg.train.recompute, cfg.train.precision = ParallelConfig(), "none", "bf16"
    return cfg


def _static_layout(cfg: PretrainConfig) -> HybridLayout:
    """Return a run's layout, whose reads don't depend on the data.

    Raises:
        ConfigError: they do, or the layout can't be built.
    """
    hybrid = hybrid_layout(cfg)
    if not hybrid.is_static:
        problem = "the data choose what some layers read"
        raise ConfigError(
            "layout.layers", cfg.layout.layers, problem, "Time them by s2train.comparison.selection_speed."
        )
    return hybrid


def _read(output: Path, parser: argparse.ArgumentParser) -> Record | None:
    """Read the results so far; None: there are none."""
    if not output.exists():
        return None
    try:
        found: Record = json.loads(output.read_text())
        if not {"settings", "environment", "rows", "dense", "layers"} <= found.keys():
            raise ValueError("it lacks rows or settings")
    except (OSError, ValueError, AttributeError) as error:
        parser.error(f"--output {output} holds no results of this program ({error}): set another")
    return found


def _begun(output: Path, found: Record | None, head: Record, parser: argparse.ArgumentParser) -> Record:
    """Return the results so far, without failed ones, and the current command."""
    if found is None:
        return head | {"rows": [], "dense": [], "layers": []}
    for part in ("environment", "settings"):
        if found.get(part) != head[part]:
            parser.error(f"{output} has results of other {part}: set another --output")
    for part in ("rows", "dense", "layers"):
        found[part] = [record for record in found[part] if "error" not in record]
    return found | {"command": head["command"]}


class _Session:
    """Times what the results lack, and writes them after each case.

    Args:
        data: the results: `rows` of layouts, `dense`, and `layers`, the distinct ones.
        layers: of the model.
    """

    def __init__(self, timer: LayerTimer, data: Record, output: Path, layers: int) -> None:
        self.timer, self.data, self.output, self.layers = timer, data, output, layers
        self._written = 0.0

    def time_dense(self, length: int) -> None:
        """Time every implementation of dense attention that runs here."""
        for name in ("flash", "cudnn", "fa4") if self.timer.device.type == "cuda" else ("auto",):
            own = {"implementation": name, "length": length}
            if _find(self.data["dense"], own) is None:
                record: Record = own | {"layers": self.layers}
                if (problem := self.timer.absent(name)) is not None:
                    record["absent"] = problem
                else:
                    record |= _figures(self._tried(partial(self.timer.time_dense, name, length)), self.layers)
                self._keep("dense", record)

    def time_layout(self, name: str, hybrid: HybridLayout, length: int) -> None:
        """Time those of a layout's layers that are new, and sum all."""
        found: list[Record] = []
        for layer, count in Counter(hybrid.layers).items():
            cache = LayoutCache()  # freed with the layer
            key = self.timer.key(layer, self.timer.layout(layer, length, cache))
            own = {"layer": key, "length": length}
            if (record := _find(self.data["layers"], own)) is None:
                timed = self._tried(partial(self.timer.time_layer, layer, length, cache))
                record = own | {"density": density(layer, length), "first_in": name} | timed
                self._keep("layers", record)
            found.append(record | {"count": count})
        row: Record = {"layout": name, "length": length, "density": density(hybrid, length)}
        row |= {"layers": self.layers, "distinct_layers": len({record["layer"] for record in found})}
        if errors := [record["error"] for record in found if "error" in record]:
            row["error"] = errors[0]
        else:
            for own_name, theirs in _FIGURES.items():
                row[own_name] = sum(record["count"] * record["ms"][theirs] for record in found)
            row["largest_spread"] = max(record["spread"] for record in found)
            row["over_dense"] = {
                dense["implementation"]: {figure: dense[figure] / row[figure] for figure in _FIGURES}
                for dense in self.data["dense"]
                if dense["length"] == length and "forward_ms" in dense
            }
        previous = _find(self.data["rows"], {"layout": name, "length": length})
        if previous is not None:
            self.data["rows"].remove(previous)
        self._keep("rows", row)

    def _tried(self, measure: Callable[[], Record]) -> Record:
        """Return a measurement, or the error that prevented it."""
        with failures() as failed:
            record = measure()
        if self.timer.device.type == "cuda":
            torch.cuda.empty_cache()
        if failed:
            return {"error": failed[0]}
        if record["check"]["wrong"]:
            record["error"] = f"differs from the oracle: {', '.join(record['check']['wrong'])}"
        return record

    def _keep(self, part: str, record: Record) -> None:
        self.data[part].append(record)
        if part != "layers" or time.monotonic() - self._written > _SECONDS_UNWRITTEN:
            write_json(self.output, self.data)
            self._written = time.monotonic()
        if part != "layers":
            print(json.dumps({name: value for name, value in record.items() if name != "check"}), flush=True)


def _figures(timed: Record, layers: int) -> Record:
    """Add the times of all layers to those of one."""
    if "ms" in timed:
        timed |= {own: layers * timed["ms"][theirs] for own, theirs in _FIGURES.items()}
    return timed


def _find(records: list[Record], wanted: Record) -> Record | None:
    return next((r for r in records if all(r[name] == value for name, value in wanted.items())), None)


def _table(data: Record) -> Table:
    table = Table(title=f"Attention of {data['settings']['layers']} layers, ms ({data['environment']['device']})")
    for name in ("tokens", "layout", "density", "forward", "with backward", "over dense (forward, with backward)"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for length in sorted({row["length"] for row in data["rows"]}):
        of_length = [record for part in ("dense", "rows") for record in data[part] if record["length"] == length]
        for record in of_length:
            name = record.get("layout", f"dense, {record.get('implementation')}")
            if "forward_ms" not in record:
                table.add_row(f"{length:,}", name, "", record.get("error", record.get("absent")))
                continue
            over = [
                f"{key} " + " ".join(f"{x:.2f}×" for x in of.values())
                for key, of in record.get("over_dense", {}).items()
            ]
            figures = (f"{record[figure]:.3f}" for figure in _FIGURES)
            table.add_row(f"{length:,}", name, f"{record.get('density', 1):.4f}", *figures, ", ".join(over))
    return table


if __name__ == "__main__":
    run_command(lambda: sys.exit(main()))
