"""Defines every setting of a run as a dataclass field.

`conf/` holds named values. Hydra checks names and types against these classes (see `register`). `s2train.planning`
checks settings that depend on each other. All types are plain, so that a saved config can be read without this code.
The comments are the programs' help texts. Settings of other programs are in the `config.py` of their folders.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from s2train.command_line.composition import check_names
from s2train.command_line.old_names import accept_in_files
from s2train.command_line.usage import meaning
from s2train.errors import ConfigError
from s2train.rope_scaling import RopeScalingConfig


@dataclass
class ModelConfig:
    """Shape of a Llama-like decoder: RMSNorm, SwiGLU, RoPE, grouped-query attention, no biases."""

    name: str = MISSING
    num_layers: int = MISSING
    hidden_size: int = MISSING
    ffn_hidden_size: int = MISSING
    num_attention_heads: int = MISSING
    num_query_groups: int = MISSING  # KV heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    vocab_size: int = MISSING  # rows of the embedding; at least the tokenizer's, a multiple of tp
    rotary_base: int = 10_000
    # share of a head's dimensions that RoPE rotates; the others ignore distance (p-RoPE, arXiv 2410.06205)
    rotary_percent: float = 1.0
    qk_norm: bool = False  # RMSNorm of each head's queries and keys before RoPE, as in Qwen3 (arXiv 2505.09388)
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    tie_embeddings: bool = False
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)


def head_dim(model: ModelConfig) -> int:
    """Return the head dimension: as set, or hidden size over query heads."""
    return model.head_dim if model.head_dim is not None else model.hidden_size // model.num_attention_heads


@dataclass
class PatternConfig:
    """Key blocks that each query block of a sparse head attends to.

    Units are blocks of `layout.block_size` tokens. Each kind takes some of the settings and rejects the others. None:
    the kind's default.
    """

    # local_vertical (local 8, stride 16, sinks 0, offset), ranges (ranges, sinks 0), sliding_window (window, sinks 0),
    # global_blocks (local 8, globals), dilated (local 1, dilation, window), dense, span (base, slope 0, sinks 0),
    # reference (local, stride, offset 0, per_kv_head false), file (file), per_head (rules, heads)
    kind: str = "local_vertical"
    local: int | None = None  # keep the last `local` blocks, including the query's own
    stride: int | None = None  # and keep every stride-th block before them, shifted by the head's offset
    sinks: int | None = None  # and keep the first `sinks` blocks
    # [[limit, stride], …], nearest first: keep every stride-th block at distances below limit; the last limit is null
    ranges: Any = None
    window: int | None = None  # keep the last `window` blocks; for dilated: keep nothing before them
    dilation: int | None = None  # keep every dilation-th distance, shifted by the head's offset
    globals: list[int] | None = None  # key blocks that every query keeps
    # for all heads: in the reference library's formula; in local_vertical, instead of the schedule's offsets
    offset: int | None = None
    per_kv_head: bool | None = None  # count KV heads instead of query heads in the reference library's formula
    file: str | None = None  # .npz file of masks; format: s2train/layouts/patterns/file.py
    base: int | None = None  # keep the last base + slope · n blocks, where n is the number of blocks up to the query
    slope: float | None = None
    rules: Any = None  # patterns by number, [{kind: dense}, {kind: span, base: 4}, …]
    heads: Any = None  # numbers in `rules`: a list for each layer of the model, with one for each query head


@dataclass
class LayoutConfig:
    """Attention of each layer. Grammar of `layers`: `s2train.attention.hybrid.parse_layers`."""

    layers: str = MISSING  # one letter per layer, D dense, S sparse (s2): DSSS, D1S3x8; repeated to the model's depth
    block_size: int = 64  # tokens
    pattern: PatternConfig = field(default_factory=PatternConfig)  # pattern of letter S
    # patterns of further letters in `layers`, with the settings of `pattern`: {W: {kind: sliding_window, window: 8}},
    # on a command line '+layout.patterns.W={kind:sliding_window,window:8}'. (Hydra can't add entries to a dict of
    # dataclasses; `s2train.layouts.patterns.registry.read_pattern` checks them.)
    patterns: dict[str, Any] = field(default_factory=dict)
    allow_partial_coverage: bool = False  # accept layouts in which no head sees some far blocks (ablations)
    # kinds of attention for further letters, with their settings: {W: {kind: s2, pattern: {kind: dense}}}, on a
    # command line '+layout.kinds.W={kind:s2,…}'; `s2train/attention/registry.py` lists the kinds
    kinds: dict[str, Any] = field(default_factory=dict)


@dataclass
class ScheduleConfig:
    """How the heads of a sparse layer get their offsets. Kinds: `s2train.layouts.schedules`."""

    kind: str = "shifted"  # shifted, strided, grouped, rotating, homogeneous, explicit (docs/layouts.md)
    # for kind=explicit: one offset per query head, or a list of such lists, one per sparse layer (fewer lists are
    # repeated; their number must divide the number of sparse layers)
    offsets: Any = None
    dense_heads: int = 0  # dense heads in each sparse layer, spread evenly over KV groups
    # as_is, or balanced: reorder heads (whole KV groups if their heads are alike) so that all tensor parallel ranks
    # keep about the same number of blocks
    placement: str = "as_is"


@dataclass
class DataConfig:
    """Megatron indexed datasets (from `launch/prepare_data.py`) and how to split and sample them."""

    # `prefix` or [prefix, …] of .bin/.idx pairs, or [weight, prefix, weight, prefix, …]; "bundled": the corpus
    # shipped with s2train, prepared on first use; "mock": Megatron's counting sequences, for speed measurements
    path: Any = "bundled"
    split: Any = "90,10,0"  # weights of train, held-out and test data; test may be left out; or 'data.split=[90,10]'
    # datasets to evaluate on, written like `path`; `path` is then for training only. None: held out by `split`
    valid_path: Any = None
    tokenizer: str = "bytes"  # bytes, or the path of a Hugging Face `tokenizer.json`
    # token of a tokenizer.json that ends a document; None: the one used to prepare the data
    end_token: str | None = None
    cache: str = "runs/data/cache"  # Megatron's document and shuffle indices
    # true: a token attends only within its document, and the layout restarts in each document; false: a token attends
    # to all documents packed into its sequence
    attention_within_documents: bool = False
    # number of samples that are shuffled together; a resumed run keeps its first value, and further epochs follow.
    # None: train.steps × train.global_batch_size (in a new phase: its own steps only)
    num_samples: int | None = None
    warn_epochs: float = 4.0  # warn if the run passes over a dataset's training part more often (arXiv 2305.16264)
    num_workers: int = 2  # processes of each rank that read samples; their number changes no result


@dataclass
class OptimConfig:
    """Megatron's optimizer and its learning-rate schedule."""

    # adam, sgd; or of the package emerging-optimizers, with megatron-core 0.19 or later: muon. Only adam works with
    # parallel.distributed_optimizer
    name: str = "adam"
    # further settings of sgd and muon, by their names in Megatron's OptimizerConfig: muon_momentum, …; on a
    # command line '+optim.options.muon_num_ns_steps=6'
    options: dict[str, Any] = field(default_factory=dict)
    # share of adam's state that is kept, and updated, in the host's memory; needs parallel.distributed_optimizer
    cpu_offload: float = 0.0
    lr: float = 3e-4
    min_lr_ratio: float | None = None  # final learning rate as a share of lr; None: 0.1, or as given by min_lr
    min_lr: float | None = None  # final learning rate itself, independent of lr; None: lr × min_lr_ratio
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0  # largest norm of all gradients; 0: no limit
    warmup_steps: int = 100
    warmup_tokens: float | None = None  # instead of warmup_steps, which follow from it
    # after train.freeze_trunk_steps, the whole learning rate warms up again over these steps. None: warmup_steps; 0:
    # the trunk begins at the schedule's rate
    trunk_warmup_steps: int | None = None
    decay_style: str = "cosine"  # constant, linear, cosine, inverse-square-root, WSD
    decay_steps: int | None = None  # None: train.steps
    decay_tokens: float | None = None  # instead of decay_steps, which follow from it
    wsd_decay_steps: int | None = None  # length of WSD's final decay, in steps
    wsd_decay_tokens: float | None = None  # instead of wsd_decay_steps, which follow from it

    @property
    def lowest_lr(self) -> float:
        """The final learning rate: `min_lr`, otherwise `min_lr_ratio` of `lr`."""
        return self.scaled_lr if self.min_lr is None else self.min_lr

    @property
    def second_warmup_steps(self) -> int:
        """Length of the warm-up after a frozen trunk."""
        return self.warmup_steps if self.trunk_warmup_steps is None else self.trunk_warmup_steps

    @property
    def scaled_lr(self) -> float:
        """`min_lr_ratio` of `lr`."""
        ratio = 0.1 if self.min_lr_ratio is None else self.min_lr_ratio
        return float(f"{self.lr * ratio:.15g}")  # rounded as decimals: a tenth of 0.003 is exactly 0.0003


@dataclass
class ParallelConfig:
    """Split of the model over ranks; the remaining ranks are data parallel."""

    tp: int = 1  # tensor model parallel: splits heads and hidden dimensions (KV heads are shared if there are fewer)
    pp: int = 1  # pipeline model parallel: splits layers
    vpp: int | None = None  # virtual pipeline stages per rank (interleaved pipeline schedule)
    pipeline_split: str = "even"  # even: equal layers per stage; cost: equal work, as dense layers cost more
    cp: int = 1  # context parallel: splits the sequence
    # keys and values that context parallel ranks exchange for sparse layers (dense layers gather all): blocks (only
    # those that the layout keeps), overlapped (the same, while attention over the rank's own keys runs; faster on slow
    # links), gather (all), auto (blocks, or gather in layers whose blocks are over 28 % of all)
    cp_exchange: str = "blocks"
    sequence_parallel: bool = False  # tensor parallel ranks also split what is between their products; needs tp > 1
    # with sequence_parallel and layer_backend=local: multiply rows of one rank while those of others are exchanged, by
    # the GPUs' copy engines; needs NVLink between tensor parallel ranks, and has no effect with tp=1
    tp_comm_overlap: bool = False
    distributed_optimizer: bool = True  # data and context parallel ranks share the optimizer's state
    overlap_grad_reduce: bool = True  # needs dp > 1
    overlap_param_gather: bool = True  # needs the distributed optimizer as well

    @property
    def tp_overlaps(self) -> bool:
        """Whether tensor parallel ranks exchange rows while products run."""
        return self.tp > 1 and self.sequence_parallel and self.tp_comm_overlap


@dataclass
class TrainConfig:
    """Length, batch, precision and memory of the run."""

    steps: int = MISSING
    seq_length: int = MISSING  # tokens
    global_batch_size: int = MISSING  # sequences
    # Megatron's ramp-up, [first batch, increment, samples]: the batch grows from the first to global_batch_size, each
    # time after equally many samples; train.steps and the learning rate's schedule count steps of any batch
    rampup_batch_size: list[int] | None = None
    micro_batch_size: int = 1  # sequences
    precision: str = "bf16"  # bf16, fp32
    recompute: str = "none"  # none, selective (core attention), mlp (MLP and norms), full (whole layers)
    recompute_num_layers: int = 1  # layers recomputed together, with full; divides num_layers / (pp × vpp)
    # save and stop after this step, to be resumed later (learning-rate schedule unchanged)
    exit_step: int | None = None
    # bit-identical results in every run of the same command on the same devices: deterministic kernels, fixed order of
    # sums
    deterministic: bool = False
    # in the run's first steps (without skipped ones), only weights that kinds of attention add learn
    freeze_trunk_steps: int = 0
    max_skipped_steps: int = 10  # stop the run after more consecutive steps with a loss or gradient that isn't finite
    spike_factor: float = 2.0  # log a loss spike when the loss exceeds this multiple of its running mean
    timeout_minutes: float = 30.0  # abort when a rank makes no progress for this long
    # tokens to train on, such as 1e9, instead of steps, which follow from it: rounded up to whole steps of
    # global_batch_size × seq_length tokens; replaces the steps of the model's file
    tokens: float | None = None

    @property
    def last_step(self) -> int:
        """The step at which the run stops."""
        return min(self.steps, self.exit_step or self.steps)


@dataclass
class CheckpointConfig:
    """Where and when to save, and what to start from."""

    interval: int = 500  # steps; the last step is always saved
    # auto: resume from the run folder's last checkpoint if there is one; never: start from scratch and reject a folder
    # with checkpoints; else a checkpoint to start from (a run folder, its checkpoints folder, or one iter_* in it)
    resume: str = "auto"
    # with `resume` naming another run: start a new phase, which reads its data from the beginning, in their own order,
    # and may change model.rotary_base and model.rope_scaling for longer sequences
    new_data: bool = False
    # with `resume` naming another run: load its weights alone, and train from step 1 with a new optimizer; the layout
    # and RoPE's base and scaling may differ; weights that its kinds of attention add begin with their initial values
    weights_only: bool = False
    # settings that may differ from the run folder's checkpoint although they change the experiment: true (any), or
    # names, such as [optim.lr,train.global_batch_size]; in a new phase (new_data) also settings of the layout and its
    # head schedule: a sparse model may become dense
    allow_changes: Any = False
    keep: int | None = None  # keep only the last `keep` checkpoints; None: all
    keep_every: int | None = None  # steps: with `keep`, also keep the checkpoints at multiples of this
    async_save: bool = False  # write in the background while training continues
    save: bool = True  # false: save nothing, for speed measurements


@dataclass
class EvaluationConfig:
    """Held-out loss during training."""

    interval: int = 100  # steps; 0: never
    batches: int = 8  # global batches each time
    # orders the held-out samples, of which an evaluation takes the first; one value makes runs of several seeds
    # comparable; null: the run's seed
    seed: int | None = 1234


@dataclass
class TrackingConfig:
    """Logging of metrics: `metrics.jsonl` in the run folder, and optionally wandb."""

    log_interval: int = 10  # steps
    # log Megatron's timers with each report: 0 none, 1 parts of a step, 2 also pipeline internals; slows steps
    timing: int = 0
    # auto (online with an API key, offline without), disabled, offline, online
    wandb: str = "auto"
    project: str = "s2train"
    entity: str | None = None  # wandb user or team; None: the account's default
    group: str | None = None
    name: str | None = None  # name of the wandb run; None: the run folder's name
    tags: list[str] = field(default_factory=list)
    tensorboard: bool = False  # write wandb's values to RUN_DIR/tensorboard too
    notes: str | None = None
    x_axis: str = "step"  # x-axis of wandb's charts: step, consumed_tokens; every row has both


@dataclass
class ProfileConfig:
    """Trace and time table of some steps, which it slows: RUN_DIR/profile."""

    steps: list[int] | None = None  # first and last step to trace, such as [10,12]; None: no trace
    ranks: list[int] = field(default_factory=lambda: [0])


@dataclass
class PlanConfig:
    """`plan=true`, or any of these: print the cost, and build nothing."""

    show: bool = False  # `plan=true` is short for plan.show=true
    # a GPU to plan for, such as h100-80gb (s2train/planning/targets.py); None: this machine's
    device: str | None = None
    # number of these GPUs; None: the number of started processes, or the fewest that hold the model
    count: int | None = None
    gpus: int | None = None  # number of these GPUs to propose divisions for: tp, pp, cp, micro batch, recomputation

    @property
    def asked(self) -> bool:
        """Whether to plan instead of training."""
        return self.show or any(value is not None for value in (self.device, self.count, self.gpus))


@dataclass
class PretrainConfig:
    """A run of `launch/pretrain.py`."""

    model: ModelConfig = MISSING
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    run_dir: str = "runs/${model.name}"  # folder of the run's logs, pictures and checkpoints
    seed: int = 1234  # seed of initial weights, the order of samples, and draws of attention
    # linear layers, norms and RoPE: auto (te if it is installed and works on this GPU, else local), local (Megatron's
    # own, on torch), te (transformer-engine)
    layer_backend: str = "auto"
    fp8: str = "none"  # linear layers with layer_backend=te: none, hybrid (E4M3, gradients E5M2), e4m3
    # scaling of FP8 values: tensorwise (by each tensor's current maximum), blockwise (Hopper and later), mxfp8
    # (Blackwell and later)
    fp8_recipe: str = "tensorwise"
    # sparse layers: auto (triton with CUDA, torch on a CPU), triton (the fastest kernels for the GPU), portable (Triton
    # kernels that are the same on every GPU), torch
    attention_backend: str = "auto"
    # dense layers on a GPU: auto (the fastest measured one that supports the call), fa4 (FlashAttention-4), s2train
    # (the sparse layers' kernels with every block kept), or torch's cudnn, flash (FlashAttention-2), efficient
    dense_attention: str = "auto"
    # SwiGLU, and with layer_backend=local RoPE, splitting heads and residual sums with their norms, on a GPU: auto
    # (liger where it is installed and verified), torch, liger
    elementwise: str = "auto"
    # cross entropy on a GPU: auto, torch (Megatron's), liger (one kernel each for forward and backward), in_place
    # (liger's kernel overwrites the logits with their gradient), linear (liger's fused with the output layer: keeps no
    # logits, recomputes them in the backward); the last two need parallel.tp=1
    loss: str = "auto"
    plan: PlanConfig = field(default_factory=PlanConfig)

    @property
    def held_out_seed(self) -> int:
        """Seed of the order of held-out samples: `evaluation.seed`, otherwise the run's."""
        return self.seed if self.evaluation.seed is None else self.evaluation.seed


@dataclass
class SweepConfig:
    """`hydra.launcher`: how `launch/pretrain.py -m` starts the jobs of a sweep."""

    nproc_per_node: int = 1  # processes per job on each machine
    skip_invalid: bool = False  # start the valid jobs when the settings of others are rejected


@dataclass
class LocalSweepConfig(SweepConfig):
    """`hydra/launcher=s2train_local`, the default: runs each job by torchrun on this machine."""

    _target_: str = "hydra_plugins.s2train.LocalLauncher"
    n_jobs: int = 1  # jobs that run at the same time
    split_gpus: bool = True  # give each concurrent job different GPUs
    grace_s: float = 30.0  # seconds for an interrupted job to end up to two steps, save and exit


@dataclass
class SlurmSweepConfig(SweepConfig):
    """`hydra/launcher=s2train_slurm`: writes and submits an sbatch script for each job."""

    _target_: str = "hydra_plugins.s2train.SlurmLauncher"
    nodes: int = 1  # nodes per job
    # sbatch options by long name: +hydra.launcher.options.cpus_per_task=8 is --cpus-per-task=8; null omits one
    options: dict[str, Any] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)  # shell lines to run before the job, such as `module load cuda`
    submit: bool = True  # false: write the scripts only
    wait: bool = False  # wait until all jobs have ended; needed by sweepers that learn from the losses


def register(others: Mapping[str, type] | None = None) -> None:
    """Register the schemas with Hydra, which then rejects typos and wrong types.

    YAML files may use old names of settings.

    Args:
        others: those of another program, by NAME in `NAME_schema`.
    """
    accept_in_files()
    OmegaConf.register_new_resolver("s2train.swept_model", _swept_model, replace=True)
    store = ConfigStore.instance()
    for name, schema in (others or {}).items():
        store.store(name=f"{name}_schema", node=schema)
    if "pretrain_schema.yaml" in store.repo:  # registered before
        return
    store.store(name="pretrain_schema", node=PretrainConfig)
    store.store(group="hydra/launcher", name="s2train_local", node=LocalSweepConfig)
    store.store(group="hydra/launcher", name="s2train_slurm", node=SlurmSweepConfig)


def _swept_model(*, _root_: DictConfig) -> str:
    """Return the name of a sweep's model, or `models` for several."""
    if OmegaConf.is_missing(_root_, "model") or OmegaConf.is_missing(_root_.model, "name"):
        return "models"
    return str(_root_.model.name)


def settings_by_name(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values of nested settings; empty sections yield nothing."""
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from settings_by_name(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def to_object(cfg: DictConfig) -> Any:
    """Convert a composed config to its dataclass.

    Raises:
        ConfigError: a setting has no value or a number beyond 64 bits, or an unknown setting was added.
    """
    check_names(cfg)
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        means = meaning(OmegaConf.get_type(cfg) or object, missing[0])
        raise ConfigError(missing[0], "(not set)", "it has no value", f"Set {missing[0]}=…{means and f': {means}'}.")
    for name, value in settings_by_name(OmegaConf.to_container(cfg, resolve=True)):  # type: ignore[arg-type]
        if any(abs(number) >= 1 << 63 for number in _integers(value)):
            raise ConfigError(name, value, "has a number beyond 64 bits", "Set a smaller one.")
    return OmegaConf.to_object(cfg)


def _integers(value: Any) -> Iterator[int]:
    """Yield the integers of a value, which may hold others."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, list | Mapping):
        for held in value.values() if isinstance(value, Mapping) else value:
            yield from _integers(held)
