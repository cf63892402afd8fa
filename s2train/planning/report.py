"""Formats a plan as text."""

from dataclasses import fields
from itertools import groupby
from typing import Any

from s2train.batch_sizes import samples_of, stages
from s2train.command_line.commands import shell_setting
from s2train.config import PretrainConfig
from s2train.costs.memory import GIB, Memory, offloaded_bytes
from s2train.costs.stages import Balance
from s2train.costs.step_time import MARGIN, Prediction
from s2train.data.epochs import describe_epochs, training_epochs
from s2train.data.indexed import read_metadata
from s2train.errors import ConfigError
from s2train.planning.numbers import duration, gib, time_text, with_unit
from s2train.planning.plan import Plan
from s2train.planning.targets import ONE_OF_NAMES
from s2train.validation.division import vocabulary_for
from s2train.validation.token_budgets import token_budgets

_UNEVEN = 0.05  # imbalance of ranks from which on to suggest a remedy
_FASTER = 0.95  # share of a step's time up to which to suggest a setting


def format_plan(plan: Plan) -> str:
    """Format a plan in about 25 lines, ending with the verdict."""
    cfg, memory, flops = plan.cfg, plan.memory, plan.flops
    train, parallel = cfg.train, cfg.parallel
    rows = [
        ("layers", f"{len(plan.letters)}: {_layers(plan.letters)} ({_counts(plan)})"),
        ("sparse", f"blocks of {cfg.layout.block_size} tokens, schedule {cfg.schedule.kind}"),
        *((f"  {letter.letter}", letter.format()) for letter in plan.sparse_letters),
        ("density", f"{plan.density:.4f} of causal positions, {plan.sparse_density:.4f} in sparse layers{_how(plan)}"),
        ("parameters", f"{with_unit(plan.parameters)}, {with_unit(plan.rank_parameters)} per rank"),
        (
            "FLOPs/token",
            f"{with_unit(flops.sparse)} {'exact' if plan.counts_exactly else 'expected'}"
            f" ({with_unit(flops.attention)} attention); "
            f"{with_unit(flops.dense)} if dense ({with_unit(flops.dense_attention)}); "
            f"ratio {flops.sparse / flops.dense:.3f}",
        ),
        (
            "a step",
            f"{train.global_batch_size * train.seq_length:,} tokens: {plan.micro_batches} × "
            f"{train.micro_batch_size} × {train.seq_length:,} on each data parallel rank",
        ),
        *([("budget", ", ".join(map(str, budgets)))] if (budgets := token_budgets(cfg)) else []),
        *_ramp_up(plan),
        *_phases(plan),
        *_teacher(plan),
        *_ranks(plan),
        *(("cp exchange", exchange.format()) for exchange in plan.exchanges),
        *_pipeline(plan),
        ("memory", "GiB per rank" + (", fullest pipeline stage" if parallel.pp > 1 else "")),
        *((f"  {name}", f"{gib(nbytes):>9}") for name, nbytes in _parts(memory)),
        ("  total", f"{gib(memory.total):>9} of {gib(plan.hardware.memory)} ({_device(plan)})"),
        *_offload(plan),
        *([("  room", plan.advice)] if plan.advice is not None else []),
        *_time(plan),
    ]
    if not plan.sparse_letters:
        rows = [row for row in rows if row[0] not in ("sparse", "density")]
    sequence = ", sequence parallel" if parallel.sequence_parallel else ""
    if parallel.tp_overlaps:
        sequence += " with overlap"
    virtual = f", vpp {parallel.vpp}" if parallel.vpp else ""
    title = (
        f"{cfg.model.name} on {plan.world_size} process{'' if plan.world_size == 1 else 'es'}: "
        f"tp {parallel.tp}, pp {parallel.pp}{virtual}, cp {parallel.cp}, dp {plan.data_parallel}{sequence}; "
        f"{train.precision}, recompute {train.recompute}"
    )
    return "\n".join([title, *(f"{name:<13} {text}" for name, text in rows), plan.coverage.format(), _verdict(plan)])


def _offload(plan: Plan) -> list[tuple[str, str]]:
    """Format the host memory that an offloaded optimizer takes."""
    if not plan.cfg.optim.cpu_offload:
        return []
    taken = offloaded_bytes(plan.cfg, plan.rank_parameters, plan.world_size)
    return [
        (
            "  on the host",
            f"{gib(taken)} GiB per rank: state of optim.cpu_offload, weights and gradients;"
            " copies are not in the predicted time",
        )
    ]


def _ramp_up(plan: Plan) -> list[tuple[str, str]]:
    """Format the steps of each batch size."""
    train = plan.cfg.train
    if train.rampup_batch_size is None:
        return []
    parts = stages(train, train.steps)
    shown = [f"{part.steps:,} of {part.batch}" for part in parts]
    if len(shown) > 6:
        shown = [*shown[:3], f"… {len(shown) - 5} more …", *shown[-2:]]
    samples = sum(part.samples for part in parts)
    text = f"steps by batch: {', '.join(shown)}; {samples:,} samples, {samples * train.seq_length:,} tokens in all"
    return [("ramp-up", text)]


def _phases(plan: Plan) -> list[tuple[str, str]]:
    """Format what each phase of the run costs, if there are several."""
    is_plain = not plan.phases[0].warms_up and not plan.phases[0].is_trunk_frozen and plan.teacher is None
    if len(plan.phases) == 1 and is_plain:
        return []
    rows = []
    train = plan.cfg.train
    for phase in plan.phases:
        lasting = ", to the run's end: it selects nothing" if phase.last == train.steps else ""
        what = [f"{label} attention warms up{lasting}" for label in phase.warms_up]
        what += ["trunk frozen, so only the weights that attention adds learn"] if phase.is_trunk_frozen else []
        again = plan.cfg.optim.second_warmup_steps
        if phase.first == train.freeze_trunk_steps + 1 > 1 and again:
            what.append(f"the learning rate warms up again, over {again} steps (optim.trunk_warmup_steps)")
        samples = samples_of(train, phase.last) - samples_of(train, phase.first - 1)
        total = phase.flops * samples * train.seq_length
        cost = f"{with_unit(phase.flops)} FLOPs/token, {total:.2e} FLOPs"
        rows.append(("", f"steps {phase.first} to {phase.last}: {cost}{''.join(f'; {one}' for one in what)}"))
    return [("phases", rows[0][1]), *rows[1:]]


def _teacher(plan: Plan) -> list[tuple[str, str]]:
    """Format what the teacher's forward passes cost."""
    if plan.teacher is None:
        return []
    cost = f"{with_unit(plan.teacher_flops)} FLOPs/token, part of every phase"
    return [("teacher", f"{plan.teacher.value}: a forward pass on each micro batch, {cost}")]


def _parts(memory: Memory) -> list[tuple[str, int]]:
    """List the parts of memory; a teacher's only if there is one."""
    parts = [(part.name, getattr(memory, part.name)) for part in fields(memory)]
    return [(name, nbytes) for name, nbytes in parts if nbytes or name != "teacher"]


def _how(plan: Plan) -> str:
    """That some counts are expected ones, where they are."""
    return "" if plan.counts_exactly else "; expected, where the data choose"


def epochs_of_plan(cfg: PretrainConfig) -> str:
    """Format how often the run passes over each dataset, with warnings."""
    samples = samples_of(cfg.train, cfg.train.steps)
    most = "at most " if cfg.checkpoint.new_data else ""  # the steps before a new phase read other data
    try:
        epochs = training_epochs(cfg.data, samples, cfg.train.seq_length)
        lines = describe_epochs(cfg.data, epochs)
        lines += [line for one in epochs if (line := _tokenizer_warning(cfg, one.prefix))]
    except ConfigError as error:
        return f"{'data':<13} epochs not counted: {error}"
    return "\n".join(line if line.startswith("warning") else f"{'data':<13} {most}{line}" for line in lines)


def _tokenizer_warning(cfg: PretrainConfig, prefix: str) -> str | None:
    """Warn of data whose tokenizer exceeds the vocabulary, or isn't the run's."""
    metadata = read_metadata(prefix)
    if metadata is None:
        return None
    its_own = shell_setting("data.tokenizer", metadata.tokenizer)
    if metadata.vocab_size > cfg.model.vocab_size:
        problem = f"the tokenizer of {prefix} has {metadata.vocab_size:,} ids, more than model.vocab_size"
        remedy = f"{vocabulary_for(metadata.vocab_size, cfg.parallel.tp)}, and {its_own}"
        return f"warning: {problem}={cfg.model.vocab_size}, so that the run will be rejected. {remedy}"
    from s2train.data.tokenizers import fingerprint  # imports tokenizers, which a start doesn't wait for

    # A tokenizer.json that isn't on this machine may be on the run's.
    if fingerprint(cfg.data.tokenizer) in (None, metadata.fingerprint):
        return None
    problem = f"{prefix} was made with another tokenizer than data.tokenizer={cfg.data.tokenizer}"
    return f"warning: {problem}, so that the run will be rejected. Set {its_own}"


def _device(plan: Plan) -> str:
    if plan.hardware.kind == "cuda":
        return plan.hardware.name
    return "this machine's RAM, no GPU" + (f", for each of {plan.world_size} processes" if plan.world_size > 1 else "")


def _verdict(plan: Plan) -> str:
    if plan.fits:
        return "It fits."
    if plan.hardware.kind == "cuda":
        return f"It does not fit. {plan.remedy}"
    return (
        "It does not fit this machine, which has no GPU. To plan for GPUs, set "
        f"plan.device={ONE_OF_NAMES}, and plan.count=N."
    )


def _time(plan: Plan) -> list[tuple[str, str]]:
    """Format the predicted step time, its parts and its basis."""
    found, train = plan.prediction, plan.cfg.train
    if found is None:
        if plan.hardware.kind != "cuda":
            return []
        why = (
            f"the peak rate of {plan.hardware.name} is unknown"
            if plan.hardware.rates is None
            else "only bf16 was measured"
            if plan.cfg.train.precision != "bf16"
            else "no step was measured of layers that read what the data choose"
        )
        return [("time", f"not predicted: {why}")]
    time, seconds = found.time, found.time.total
    shown = {name: part for name, part in time.parts().items() if part >= 0.005 * seconds}
    whole_steps = samples_of(train, train.steps) / train.global_batch_size  # a ramp-up's steps are shorter
    rows = [
        (
            "time",
            f"{time_text(seconds)} per step, {with_unit(found.tokens_per_s)} tokens/s"
            f" ({with_unit(found.tokens_per_s / plan.world_size)} per GPU), MFU {found.mfu:.1%};"
            f" {train.steps:,} steps take {duration(seconds * whole_steps)}",
        ),
        ("  of which", ", ".join(f"{name} {part / seconds:.0%}" for name, part in shown.items())),
        ("  based on", basis(found)),
    ]
    if plan.with_overlap is not None and plan.with_overlap.time.total < _FASTER * seconds:
        faster = time_text(plan.with_overlap.time.total)
        rows.append(("  faster", f"{faster} per step with parallel.tp_comm_overlap=true, by measurements of two ranks"))
    if found.slow_host_s is not None:
        slow = f"a slow host takes up to {1e3 * found.slow_host_s:.3g} ms to launch a layer, more than predicted here"
        rows.append(("  host", f"{slow}; larger micro batches take fewer launches"))
    return rows


def basis(found: Prediction) -> str:
    """Format what a prediction is based on."""
    layers = "transformer-engine's layers" if found.te else "layer_backend=local"
    if found.caveats:
        return f"an estimate, {layers}: {'; '.join(found.caveats)}"
    return f"steps measured on H100s and H200s, {layers}, reproduced within {MARGIN:.0%}"


def _ranks(plan: Plan) -> list[tuple[str, str]]:
    """Format how unevenly kept blocks are spread over tensor parallel ranks."""
    if plan.cfg.parallel.tp == 1 or not plan.sparse_letters:
        return []
    can_balance = plan.tp_spread > _UNEVEN and plan.cfg.schedule.placement != "balanced"
    advice = (
        "; schedule.placement=balanced spreads heads (for new models only: it reorders heads)" if can_balance else ""
    )
    return [("tp ranks", f"busiest rank {plan.tp_spread:.1%} above the mean of kept positions{advice}")]


def _pipeline(plan: Plan) -> list[tuple[str, str]]:
    """Format layers and idle time of the pipeline stages.

    For an even split, also those of a split by cost, if better.
    """
    if plan.cfg.parallel.pp == 1:
        return []
    rows = [("pipeline", f"{_balance(plan.pipeline)}, split {plan.cfg.parallel.pipeline_split}")]
    if plan.pipeline_by_cost.idle < plan.pipeline.idle:
        rows.append(("", f"{_balance(plan.pipeline_by_cost)}, with parallel.pipeline_split=cost"))
    return rows


def _balance(found: Balance) -> str:
    layers = " ".join("+".join(map(str, found.stages.of_rank(rank))) for rank in range(found.stages.pp))
    return f"layers {layers}; busiest stage {found.imbalance:.1%} above the mean; idle {found.idle:.1%} of the time"


def figures(plan: Plan) -> dict[str, Any]:
    """Return a plan's figures by name, to compare runs."""
    return {
        "layers": _layers(plan.letters),
        "density": plan.density,
        "sparse_density": plan.sparse_density,
        "parameters": plan.parameters,
        "flops_per_token": plan.flops.sparse,
        "planned_memory_gib": plan.memory.total / GIB,
        "predicted_step_time_s": plan.prediction.time.total if plan.prediction else None,
        "device": plan.hardware.name,
        "processes": plan.world_size,
        "cp_exchanges": [[exchange.letter, exchange.mode, exchange.share] for exchange in plan.exchanges],
    }


def letter_rows(plan: Plan) -> list[list[Any]]:
    """Return [letter, number of layers, patterns, density] per sparse letter."""
    return [[one.letter, plan.letters.count(one.letter), one.form, one.density] for one in plan.sparse_letters]


def _layers(letters: str) -> str:
    """Shorten a layer string to its period and count, such as DSSSx8."""
    length = len(letters)
    period = next(n for n in range(1, length + 1) if length % n == 0 and letters[:n] * (length // n) == letters)
    if period in (1, length):
        runs = ((letter, len(list(group))) for letter, group in groupby(letters))
        return "".join(f"{letter}{count if count > 1 else ''}" for letter, count in runs)
    return f"{letters[:period]}x{length // period}"


def _counts(plan: Plan) -> str:
    dense = plan.letters.count("D")
    return f"{dense} dense, {len(plan.letters) - dense} sparse"
