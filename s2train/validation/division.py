"""Checks that heads, layers, sequence and batch divide over the ranks."""

import math
from collections.abc import Sequence

from s2train.config import ModelConfig, PretrainConfig, head_dim
from s2train.errors import ConfigError
from s2train.validation.rope_scaling import check_rope_scaling


def smallest_world(cfg: PretrainConfig) -> int:
    """Return the number of processes that hold one copy of the model."""
    return cfg.parallel.tp * cfg.parallel.pp * cfg.parallel.cp


def check_division(cfg: PretrainConfig, world_size: int) -> None:
    """Check that `world_size` processes can split model and batch, ignoring the layout.

    Raises:
        ConfigError: on the first setting that doesn't divide.
    """
    _check_heads(cfg)
    check_tensor_parallel(cfg.model, cfg.parallel.tp, "parallel.tp")
    _check_pipeline(cfg)
    _check_recomputation(cfg)
    _check_sequence(cfg)
    _check_world(cfg, world_size)


def multiple_of(setting: str, value: int, unit: int) -> str:
    """Format the remedy for a value that must be a multiple."""
    return f"Set {setting} to a multiple of {unit}, such as {-(-value // unit) * unit}."


def vocabulary_for(ids: int, tp: int) -> str:
    """Format the remedy for a vocabulary smaller than a tokenizer's."""
    return f"Set model.vocab_size={-(-ids // tp) * tp} or more, a multiple of parallel.tp"


def _check_heads(cfg: PretrainConfig) -> None:
    model = cfg.model
    if model.head_dim is None:
        _divides(
            "model.num_attention_heads",
            model.num_attention_heads,
            "model.hidden_size",
            model.hidden_size,
            "or set model.head_dim",
        )
    dim = head_dim(model)
    if dim % 2:
        raise ConfigError(
            "model.head_dim",
            dim,
            "rotary embeddings rotate pairs",
            "Set model.head_dim to an even number.",
        )
    rotated = int(dim * model.rotary_percent)
    if model.rotary_percent > 1 or rotated % 2 or not rotated:
        problem = f"{rotated} of {dim} dimensions would be rotated: rotary embeddings rotate pairs"
        remedy = f"Set model.rotary_percent={max(2, min(rotated, dim) // 2 * 2) / dim:g}."
        raise ConfigError("model.rotary_percent", model.rotary_percent, problem, remedy)
    check_rope_scaling(model, cfg.parallel.cp)
    _divides(
        "model.num_query_groups",
        model.num_query_groups,
        "model.num_attention_heads",
        model.num_attention_heads,
    )


def check_tensor_parallel(model: ModelConfig, tp: int, setting: str) -> None:
    """Check that `tp` ranks (at least 1) can split each layer.

    With more ranks than KV heads, the same number of ranks shares each KV head.

    Raises:
        ConfigError: on `setting`, the name of tp on the command line.
    """
    for name in ("num_attention_heads", "hidden_size", "ffn_hidden_size", "vocab_size"):
        _divides(setting, tp, f"model.{name}", getattr(model, name))
    heads, groups = model.num_attention_heads, model.num_query_groups
    rows = (heads + 2 * groups) * head_dim(model)
    fitting = [n for n in range(1, heads + 1) if heads % n == 0 and rows % n == 0 and 0 in (groups % n, n % groups)]
    if tp in fitting:
        return
    if groups % tp and tp % groups:
        problem = f"neither divides model.num_query_groups={groups} nor is a multiple of it"
    else:
        problem = f"doesn't divide the {rows} rows of the QKV projection, of which ranks that share KV heads hold parts"
    near = sorted(sorted(fitting, key=lambda n: abs(n - tp))[:4])
    raise ConfigError(setting, tp, problem, f"Set {setting} to one of {_list(near)}, or change model.num_query_groups.")


def check_one_model(tp: int, world_size: int) -> None:
    """Reject `tp` unless all processes of the job share one model.

    Raises:
        ConfigError: `tp` is not the number of processes.
    """
    if tp != world_size:
        problem = f"does not equal the {world_size} processes of this job"
        raise ConfigError("tp", tp, problem, f"Set tp={world_size}, or start {tp} processes")


def check_whole_models(tp: int, world_size: int) -> None:
    """Reject `tp` unless the processes of the job hold whole models.

    Raises:
        ConfigError: `tp` is below 1, or doesn't divide the number of processes.
    """
    if tp < 1 or world_size % tp:
        divisors = _list([n for n in range(1, world_size + 1) if world_size % n == 0])
        more = f", or start the program by launch/job.py --nproc-per-node {tp}" if tp > world_size else ""
        problem = f"doesn't divide the job's number of processes, {world_size}"
        raise ConfigError("tp", tp, problem, f"Set tp to {'one of ' * (world_size > 1)}{divisors}{more}")


def _check_pipeline(cfg: PretrainConfig) -> None:
    layers, pp, vpp = cfg.model.num_layers, cfg.parallel.pp, cfg.parallel.vpp
    by_cost = cfg.parallel.pipeline_split == "cost"
    if by_cost and pp * (vpp or 1) > layers:
        most = layers // (vpp or 1)
        raise ConfigError(
            "parallel.pp",
            pp,
            f"each of {pp * (vpp or 1)} stages needs a layer, and model.num_layers={layers}",
            f"Set parallel.pp to {most} or less."
            if vpp is None or most > 1
            else f"Set parallel.vpp=null, and parallel.pp to {layers} or less.",
        )
    if not by_cost:
        _divides("parallel.pp", pp, "model.num_layers", layers, "or set parallel.pipeline_split=cost")
    if vpp is None:
        return
    if pp == 1:
        raise ConfigError(
            "parallel.vpp",
            vpp,
            "virtual stages need parallel.pp above 1",
            "Set parallel.vpp=null, or parallel.pp=2.",
        )
    if vpp == 1:  # Megatron's interleaved schedule, which vpp asks for, needs several stages
        problem = "a rank with one stage has no virtual ones"
        raise ConfigError("parallel.vpp", vpp, problem, "Set parallel.vpp=null, or 2 or more.")
    if not by_cost and layers % (pp * vpp):
        fitting = ["null", *(str(n) for n in range(2, layers // pp + 1) if layers % (pp * n) == 0)]
        raise ConfigError(
            "parallel.vpp",
            vpp,
            f"model.num_layers={layers} can't be divided into parallel.pp × parallel.vpp = {pp * vpp} parts",
            f"Set parallel.vpp to one of {', '.join(fitting)}, or set parallel.pipeline_split=cost.",
        )


def _check_recomputation(cfg: PretrainConfig) -> None:
    if cfg.train.recompute != "full":
        return
    if cfg.parallel.pp > 1 and cfg.parallel.pipeline_split == "cost":
        if cfg.train.recompute_num_layers > 1:
            raise ConfigError(
                "train.recompute_num_layers",
                cfg.train.recompute_num_layers,
                "stages split by cost have different numbers of layers",
                "Set train.recompute_num_layers=1, or parallel.pipeline_split=even.",
            )
    else:
        layers = cfg.model.num_layers // (cfg.parallel.pp * (cfg.parallel.vpp or 1))
        _divides(
            "train.recompute_num_layers",
            cfg.train.recompute_num_layers,
            "model.num_layers / (pp × vpp)",
            layers,
            "or set train.recompute=selective",
        )


def _check_sequence(cfg: PretrainConfig) -> None:
    length, parallel = cfg.train.seq_length, cfg.parallel
    if parallel.sequence_parallel and parallel.tp == 1:
        raise ConfigError(
            "parallel.sequence_parallel",
            True,
            "it splits the sequence over tensor parallel ranks, and there is only one",
            "Set parallel.tp to 2 or more, or parallel.sequence_parallel=false.",
        )
    # Context parallel gives each rank two chunks; sequence parallel then splits a rank's part.
    unit = parallel.cp * math.lcm(2 if parallel.cp > 1 else 1, parallel.tp if parallel.sequence_parallel else 1)
    if length % unit:
        raise ConfigError(
            "train.seq_length",
            length,
            f"parallel.cp={parallel.cp} and sequence parallel over parallel.tp={parallel.tp} don't divide it",
            multiple_of("train.seq_length", length, unit),
        )


def _check_world(cfg: PretrainConfig, world_size: int) -> None:
    parallel, train = cfg.parallel, cfg.train
    copy = smallest_world(cfg)
    if world_size % copy:
        sizes = {"parallel.tp": parallel.tp, "parallel.pp": parallel.pp, "parallel.cp": parallel.cp}
        setting = max(sizes, key=lambda name: sizes[name])
        raise ConfigError(
            setting,
            sizes[setting],
            f"the model takes tp × pp × cp = {parallel.tp} × {parallel.pp} × {parallel.cp} processes, "
            f"and {world_size} {'was' if world_size == 1 else 'were'} started",
            f"Start a multiple of {copy} (torchrun --nproc-per-node {copy}), or set {setting} to fit.",
        )
    dp = world_size // copy
    micro = train.micro_batch_size
    if train.global_batch_size % (dp * micro):
        unit = dp * micro
        raise ConfigError(
            "train.global_batch_size",
            train.global_batch_size,
            f"{dp} data parallel ranks × train.micro_batch_size={micro} don't divide it",
            multiple_of("train.global_batch_size", train.global_batch_size, unit),
        )
    _check_ramp_up(cfg, dp)
    micro_batches = train.global_batch_size // (dp * micro)
    if parallel.vpp is not None and micro_batches % parallel.pp:
        unit = dp * micro * parallel.pp
        raise ConfigError(
            "train.global_batch_size",
            train.global_batch_size,
            f"with parallel.vpp a rank's {micro_batches} micro batches must divide by pp={parallel.pp}",
            multiple_of("train.global_batch_size", train.global_batch_size, unit),
        )


def _check_ramp_up(cfg: PretrainConfig, dp: int) -> None:
    """Check that all ramp-up batches divide into micro batches of `dp` ranks."""
    train, name = cfg.train, "train.rampup_batch_size"
    ramp = train.rampup_batch_size
    if ramp is None:
        return
    if cfg.checkpoint.new_data:
        problem = "a new phase (checkpoint.new_data=true) would begin with its first batch again"
        raise ConfigError(name, ramp, problem, f"Set {name}=null.")
    unit = dp * train.micro_batch_size * (1 if cfg.parallel.vpp is None else cfg.parallel.pp)
    such = f"[{unit},{unit},{100 * train.global_batch_size}]"
    if len(ramp) != 3 or min(ramp) < 1:
        problem = "is not a first batch, an increment and a number of samples, all at least 1"
        raise ConfigError(name, ramp, problem, f"Set {name}, such as {such}, or null.")
    first, increment, _ = ramp
    whole = train.global_batch_size
    if unit >= whole:
        problem = f"one micro batch for each data parallel rank is train.global_batch_size={whole} already"
        remedy = f"Set train.global_batch_size={2 * unit} or more, a smaller train.micro_batch_size, or {name}=null."
        raise ConfigError(name, ramp, problem, remedy)
    if first >= whole or (whole - first) % increment:
        problem = f"no number of increments of {increment} leads from {first} to train.global_batch_size={whole}"
        raise ConfigError(
            name, ramp, problem, f"Set an increment that divides their difference, such as {such}, or null."
        )
    if first % unit or increment % unit:
        problem = f"{dp} data parallel ranks × train.micro_batch_size={train.micro_batch_size}"
        problem += "" if cfg.parallel.vpp is None else f" × parallel.pp={cfg.parallel.pp}"
        remedy = f"Set multiples of {unit}, such as {such}, or a smaller train.micro_batch_size."
        raise ConfigError(name, ramp, f"{problem} don't divide its batches", remedy)


def _divides(setting: str, value: int, whole_name: str, whole: int, also: str = "") -> None:
    if whole % value:
        small = [n for n in range(1, math.isqrt(whole) + 1) if whole % n == 0]  # quick for a mistyped number too
        divisors = sorted({*small, *(whole // n for n in small)})
        near = sorted(sorted(divisors, key=lambda n: abs(n - value))[:4])
        alternative = f", {also}" if also else f", or change {whole_name}"
        raise ConfigError(
            setting,
            value,
            f"doesn't divide {whole_name}={whole}",
            f"Set {setting} to {'one of ' * (len(near) > 1)}{_list(near)}{alternative}.",
        )


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
