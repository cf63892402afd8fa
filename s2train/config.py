"""Every setting of a run, as dataclasses; `conf/` holds the named values.

Hydra checks names and types against these (see `register`); `s2train.planning` checks what needs more than one
setting to judge. Only plain types here, so that a saved config reads back without this code.
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
    # share of a head's dimensions that turn; the others match words at any distance alike (p-RoPE, arXiv 2410.06205)
    rotary_percent: float = 1.0
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    tie_embeddings: bool = False


@dataclass
class PatternConfig:
    """One sparse head: which key blocks a query block keeps. Units: blocks of `layout.block_size` tokens.

    Each kind has some of the settings, and refuses the others; None: not set, the kind's default.
    """

    # local_vertical (local 8, stride 16, sinks 0), ranges (ranges, sinks 0), sliding_window (window, sinks 0),
    # global_blocks (local 8, globals), dilated (local 1, dilation, window), dense,
    # reference (local, stride, offset 0, per_kv_head false), file (file)
    kind: str = "local_vertical"
    local: int | None = None  # keeps the last `local` blocks, its own among them
    stride: int | None = None  # and every stride-th block before them, shifted by the head's offset
    sinks: int | None = None  # and the first `sinks` blocks
    # [[limit, stride], …], nearest first: every stride-th block at distances below limit; the last limit is null
    ranges: Any = None
    window: int | None = None  # keeps the last `window` blocks; of dilated: nothing beyond
    dilation: int | None = None  # every dilation-th distance, shifted by the head's offset
    globals: list[int] | None = None  # key blocks that every query keeps
    offset: int | None = None  # of all heads, in the reference library's formula
    per_kv_head: bool | None = None  # the reference library's formula counts KV heads, not query heads
    file: str | None = None  # .npz of masks; its format: s2train/layouts/patterns/file.py


@dataclass
class LayoutConfig:
    """Which attention each layer has. The string's grammar: `s2train.layouts.hybrid.parse_layers`."""

    layers: str = MISSING  # one letter a layer, D dense, S sparse (s2): DSSS, D1S3x8; repeated to the model's depth
    block_size: int = 64  # tokens
    pattern: PatternConfig = field(default_factory=PatternConfig)  # of letter S
    # settings of `pattern` for further letters, for use in `layers`: {W: {kind: sliding_window, window: 8}}, on a
    # command line '+layout.patterns.W={kind:sliding_window,window:8}'. (Hydra adds no entry to a dict of dataclasses,
    # so that `s2train.layouts.patterns.registry.read_pattern` checks them.)
    patterns: dict[str, Any] = field(default_factory=dict)
    allow_partial_coverage: bool = False  # go on though some far blocks are seen by no head (ablations)


@dataclass
class ScheduleConfig:
    """How heads of a sparse layer get their offsets. Kinds: `s2train.layouts.schedules`."""

    kind: str = "shifted"
    # of kind explicit: one offset a query head, for all sparse layers, or one such list for each sparse layer (or
    # for as many as divide them, repeated)
    offsets: Any = None
    dense_heads: int = 0  # how many heads of each sparse layer are dense, spread evenly over KV groups
    # balanced: heads (whole KV groups where alike) change places so that tensor parallel ranks keep as much each
    placement: str = "as_is"


@dataclass
class DataConfig:
    """Megatron indexed datasets (`launch/prepare_data.py` makes them) and how to cut them."""

    # `prefix` or [prefix, …] of .bin/.idx pairs, or [weight, prefix, weight, prefix, …]; "bundled": the corpus
    # that comes with s2train, prepared on first use; "mock": Megatron's counting sequences, for speed runs
    path: Any = "bundled"
    split: Any = "90,10,0"  # weights of train, held out and test, the last may be left out; or 'data.split=[90,10]'
    # datasets to evaluate on, written like `path`, all of which is then for training; None: held out by `split`
    valid_path: Any = None
    tokenizer: str = "bytes"  # bytes, or a `tokenizer.json` of Hugging Face's tokenizers
    end_token: str | None = None  # of a tokenizer.json: ends documents; None: the one that the data were prepared with
    cache: str = "runs/data/cache"  # Megatron's document and shuffle indices
    # a token sees its own document only, and the layout begins anew in each; else all that is packed into a sequence
    attention_within_documents: bool = False
    # samples whose epochs are shuffled together; a run keeps the number that it began with, and further epochs follow.
    # None: train.steps × train.global_batch_size (of a new phase its own steps)
    num_samples: int | None = None
    warn_epochs: float = 4.0  # passes over a dataset's training part, above which a warning comes (arXiv 2305.16264)
    num_workers: int = 2


@dataclass
class OptimConfig:
    """Megatron's Adam and its learning-rate schedule."""

    lr: float = 3e-4
    min_lr_ratio: float | None = None  # where lr decays to, as a share of lr; None: 0.1, or as min_lr says
    min_lr: float | None = None  # the same as a learning rate, which stays when lr changes; None: lr × min_lr_ratio
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0
    warmup_steps: int = 100
    decay_style: str = "cosine"  # constant, linear, cosine, inverse-square-root, WSD
    decay_steps: int | None = None  # None: train.steps
    wsd_decay_steps: int | None = None  # the last steps of WSD

    @property
    def lowest_lr(self) -> float:
        """The learning rate at the end of the decay: `min_lr`, or else `min_lr_ratio` of `lr`."""
        return self.scaled_lr if self.min_lr is None else self.min_lr

    @property
    def scaled_lr(self) -> float:
        """`min_lr_ratio` of `lr`."""
        ratio = 0.1 if self.min_lr_ratio is None else self.min_lr_ratio
        return float(f"{self.lr * ratio:.15g}")  # as decimals multiply: a tenth of 0.003 is 0.0003 to the last bit


@dataclass
class ParallelConfig:
    """How the model is spread over ranks; what remains of the world is data parallel."""

    tp: int = 1  # tensor model parallel: heads and hidden
    pp: int = 1  # pipeline model parallel: layers
    vpp: int | None = None  # virtual pipeline stages a rank (interleaved schedule)
    pipeline_split: str = "even"  # even: as many layers a stage; cost: as much work, dense layers counted as dense
    cp: int = 1  # context parallel: sequence
    # how keys and values get to sparse layers of other context parallel ranks (dense layers gather all): blocks
    # (only those that the layout keeps), overlapped (the same, while attention over the own keys runs; pays between
    # slow links), gather (all)
    cp_exchange: str = "blocks"
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = True  # needs dp > 1
    overlap_param_gather: bool = True  # needs the distributed optimizer as well


@dataclass
class TrainConfig:
    """Length, batch, precision and memory of the run."""

    steps: int = MISSING
    seq_length: int = MISSING  # tokens
    global_batch_size: int = MISSING  # sequences
    micro_batch_size: int = 1  # sequences
    precision: str = "bf16"  # bf16, fp32
    recompute: str = "none"  # none, selective (core attention), full
    recompute_num_layers: int = 1  # layers recomputed together, with full; divides num_layers / (pp × vpp)
    exit_step: int | None = None  # save and stop after this step, of train.steps, to be resumed (schedule unchanged)
    # the same bits in every run of the same command on the same devices: deterministic kernels, fixed order of sums
    deterministic: bool = False
    max_skipped_steps: int = 10  # in a row, for a loss or gradient that isn't finite, before the run stops
    spike_factor: float = 2.0  # a loss this many times the running mean is told as a spike
    timeout_minutes: float = 30.0  # a rank that comes no further in this time ends the job

    @property
    def last_step(self) -> int:
        """The step at which the run stops."""
        return min(self.steps, self.exit_step or self.steps)


@dataclass
class CheckpointConfig:
    """Where and when to save, and what to start from."""

    interval: int = 500  # steps; the last step is always saved
    # auto: go on from the run folder's last checkpoint if there is one; never: start afresh, refuse a used folder;
    # else a checkpoint to start from (a run folder, its checkpoints folder, or one iter_* in it)
    resume: str = "auto"
    # with `resume` naming another run: a new phase, which takes its data from their beginning, in their own order, and
    # may raise model.rotary_base for longer sequences
    new_data: bool = False
    # what may differ from the checkpoint in the run folder, of the settings that change the experiment: true (any), or
    # names, as [optim.lr,train.global_batch_size]
    allow_changes: Any = False
    keep: int | None = None  # keep only the last `keep` checkpoints; None: all
    keep_every: int | None = None  # steps: of those, the checkpoints at multiples of it stay as well
    async_save: bool = False  # write in the background while training goes on
    save: bool = True  # false: save nothing, for runs that measure speed


@dataclass
class EvaluationConfig:
    """Held-out loss during training."""

    interval: int = 100  # steps; 0: never
    batches: int = 8  # global batches each time


@dataclass
class TrackingConfig:
    """Where metrics go: always `metrics.jsonl` in the run folder, and wandb where asked."""

    log_interval: int = 10  # steps
    timing: int = 0  # Megatron's timers, each report: 0 none, 1 parts of a step, 2 pipeline inner parts; slows steps
    # auto (online with an account, offline without), disabled, offline, online
    wandb: str = "auto"
    project: str = "s2train"
    entity: str | None = None  # wandb's user or team; None: the account's default
    group: str | None = None
    name: str | None = None  # of the wandb run; None: the run folder's
    tags: list[str] = field(default_factory=list)
    notes: str | None = None
    x_axis: str = "step"  # of wandb's charts: step, consumed_tokens; every row has both


@dataclass
class ProfileConfig:
    """A trace of some steps and what their time went to, in `profile` in the run folder. Slows those steps."""

    steps: list[int] | None = None  # first and last step to trace, such as [10,12]; None: none
    ranks: list[int] = field(default_factory=lambda: [0])


@dataclass
class PlanConfig:
    """Print what the run will cost, and build nothing: `plan=true`, short for plan.show=true, or any of these."""

    show: bool = False
    device: str | None = (
        None  # a GPU to plan for, such as h100-80gb (s2train/planning/targets.py); None: this machine's
    )
    count: int | None = None  # so many of them; None: as many as were started, or as hold the model once

    @property
    def asked(self) -> bool:
        """Whether to plan and not to train."""
        return self.show or self.device is not None or self.count is not None


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
    run_dir: str = "runs/${model.name}"
    seed: int = 1234
    # linear layers, norms, rotation: auto (te where it is installed and works on a GPU, else local), local (Megatron's
    # own on torch), te (transformer-engine)
    layer_backend: str = "auto"
    fp8: str = "none"  # linear layers with layer_backend=te: none, hybrid (E4M3, gradients E5M2), e4m3
    # how FP8 values are scaled: tensorwise (by each tensor's present maximum), blockwise (from Hopper on), mxfp8 (from
    # Blackwell on)
    fp8_recipe: str = "tensorwise"
    # sparse layers: auto (triton where CUDA is, torch on a CPU), triton (the fastest kernels for the GPU), portable
    # (Triton's alone, the same on every GPU), torch
    attention_backend: str = "auto"
    # dense layers on a GPU: auto (the fastest measured of those that serve the call), fa4 (FlashAttention-4), s2train
    # (the sparse layers' kernels, every block kept), or torch's cudnn, flash (FlashAttention-2), efficient
    dense_attention: str = "auto"
    # SwiGLU, and the rotation of layer_backend=local, on a GPU: auto (liger where installed and verified), torch, liger
    elementwise: str = "auto"
    # cross entropy on a GPU: auto, torch (Megatron's), liger (in one kernel each way), linear (liger's together with
    # the output layer, so that no logits are kept and the backward computes them again; parallel.tp=1)
    loss: str = "auto"
    plan: PlanConfig = field(default_factory=PlanConfig)


@dataclass
class ShowLayoutConfig(PretrainConfig):
    """A run of `launch/show_layout.py`: the settings of a run, to show its layout by."""

    seq_length: int | None = None  # tokens; None: train.seq_length
    layers: list[int] | None = None  # whose block masks to draw; None: the first of each sort that isn't dense
    output: str = "runs/layouts/${model.name}"  # folder of layout.png and layout.json


@dataclass
class NeedleConfig:
    """A run of `launch/needle.py`."""

    checkpoint: str = MISSING  # a run folder, its checkpoints folder, or one iter_* in it
    tokenizer: str | None = None  # where the run's tokenizer.json was moved to; None: the run's own
    lengths: list[int] | None = None  # tokens, prompt and answer together; None: four up to the trained length
    # what is hidden and asked: single, multi, key_value, variable_tracking, or [task, …]; see data/needle_tasks.py
    task: Any = "single"
    needles: int | None = None  # of multi: keys with a value each; None: 4
    ask: str | None = None  # one or all: of multi's keys, or of variable_tracking's names; None: one, and all
    distractors: int | None = None  # of key_value: other lines; None: as many as the length holds, and no haystack
    hops: int | None = None  # of variable_tracking: names that stand for another one; None: 4
    chains: int | None = None  # of variable_tracking: all but one not asked for; None: 1
    haystack: Any = "noise"  # what surrounds the needles: noise (RULER's repeated sentences), a text file, or [file, …]
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])  # 0: at the beginning
    # share of the length by which each trial's needle is off its depth, at most, drawn evenly: at the very depths all
    # trials of a round length would meet the same stripe of a layout
    depth_jitter: float = 0.05
    trials: int = 8  # a cell, that is a length and a depth
    batch_size: int = 8  # sequences decoded at once, on a data parallel rank
    batch_tokens: int | None = None  # at most so many at once, but one sequence at least; None: no such limit
    extra_tokens: int = 16  # decoded past the answer's length, for the score that asks whether the text contains it
    seed: int = 1234  # of keys, values and where the haystack starts
    threshold: float = 0.856  # score that makes a length an effective one; RULER's
    output: str | None = None  # folder for JSON and PNG of each task; None: `needle` in the run folder
    attention_backend: str = "auto"  # sparse layers, as in a run
    tp: int = 1  # tensor model parallel; the other processes share the trials
    wandb: str = "disabled"  # auto, offline, online: heat map, table and score go to the training's own wandb run


@dataclass
class NeedleDocumentsConfig:
    """Documents to learn needle retrieval from. What the evaluation asks for never occurs in them.

    A pair [low, high]: each document draws log-evenly from it.
    """

    # recall, recall_lines: many facts, each told again later, which asks for it; the facts of the tasks single and
    # key_value. Or a task of the evaluation (`s2train.needles.tasks`): one of its samples in each document
    task: str = "recall"
    documents: int = 10_000
    length: int = 512  # tokens of every document, its end among them
    share: list[float] = field(default_factory=lambda: [0.05, 1.0])  # of a recall's tokens: sentences, filler the rest
    facts: list[int] = field(default_factory=lambda: [1, 64])  # of a recall, if half of its sentences are as many
    # share of recalls that tell as many facts as they have room for and ask for each once, all at the end, so that
    # look-ups go back over any part of the document alike; in the others, where a fact is told many times, one in a
    # hundred goes back over half of it
    questions_last: float = 0.0
    haystack: Any = "noise"  # filler: noise (RULER's repeated sentences), bundled, a text file, or [file, …]
    workers: int = 1  # processes; the documents don't depend on it


@dataclass
class PrepareConfig:
    """A run of `launch/prepare_data.py`."""

    # a file or [file, …], * standing for any name: text or JSON lines, either as .gz, .zst, .bz2 or .xz, or .parquet;
    # "bundled": the corpus that comes with s2train; "needles": documents made as `needles` says
    input: Any = MISSING
    output: str = MISSING  # prefix of the .bin, .idx and .json to write
    tokenizer: str = "bytes"  # bytes, a tokenizer.json, or bpe:SIZE to train one, kept as OUTPUT-tokenizer.json
    # of text that a bpe is trained on, about, taken evenly from all documents; less where there is less
    tokenizer_chars: int = 200_000_000
    # of a tokenizer.json: put after each document; no text may encode to it. None: <|endoftext|>, </s>, <eod>,
    # <|end_of_text|> or <eos>, the first that there is. Written as 'end_token="<eos>"', in both quotes
    end_token: str | None = None
    format: str = "auto"  # of all input: text, jsonl, parquet; auto: by each file's content and name
    text_key: str = "text"  # what a line's or a table's documents are called, in JSON lines and .parquet
    # cuts a text file into documents of this many characters or more, shuffled as others are; None: it is one document
    # (the bundled corpus is cut at 10,000)
    document_chars: int | None = None
    seed: int = 1234  # of the order of documents
    workers: int | None = None  # processes that tokenize; None: as many as cores, less for small input or bytes
    overwrite: bool = False
    needles: NeedleDocumentsConfig = field(default_factory=NeedleDocumentsConfig)  # of input=needles


SOURCE_FILES = (
    ".c", ".h", ".S", ".rs", ".py", ".pl", ".sh", ".rst", ".txt", ".yaml", ".dts", ".dtsi", "Makefile", "Kconfig",
)  # fmt: skip


@dataclass
class CorpusConfig:
    """A run of `launch/make_corpus.py`."""

    tree: str = MISSING  # folder of source files
    output: str = MISSING  # folder for train.jsonl, held-out.jsonl and corpus.json
    # endings, or whole names, of the files to read
    suffixes: list[str] = field(default_factory=lambda: list(SOURCE_FILES))
    depth: int = 2  # levels of folders that name a subsystem: 2 for fs/ext4
    held_out: list[str] = field(default_factory=list)  # subsystems; empty: chosen by a hash of their names
    held_out_share: float = 0.02  # of all characters, where `held_out` names none
    duplicate_share: float = 0.8  # of a file's lines, in groups of five, seen before: it is dropped
    seed: int = 1234  # of the choice of held-out subsystems
    workers: int | None = None  # processes that read files; None: one per core
    overwrite: bool = False


@dataclass
class ExportConfig:
    """A run of `launch/export.py`."""

    checkpoint: str = MISSING  # a run folder, its checkpoints folder, or one iter_* in it
    output: str = MISSING  # folder to make
    vocab_size: int | None = None  # rows of the embedding to keep, where it was padded; None: all
    tokenizer: str | None = None  # where the run's tokenizer.json was moved to; None: the run's own


@dataclass
class ImportConfig:
    """A run of `launch/import.py`."""

    weights: str = MISSING  # folder with a Llama's config.json and .safetensors
    output: str = MISSING  # run folder to make, for checkpoint.resume
    vocab_size: int | None = None  # rows of the embedding, of zeros where there are more; None: as many as there are
    precision: str = "bf16"  # of the weights kept: bf16, fp32
    # folder of configuration groups for the run's settings, model/imported/NAME.yaml; None: conf/ beside launch/
    conf: str | None = None


@dataclass
class SweepConfig:
    """`hydra.launcher`: how `launch/pretrain.py -m` starts the jobs of a sweep."""

    nproc_per_node: int = 1  # processes of a job on one machine
    skip_invalid: bool = False  # start the other jobs where the settings of some are refused


@dataclass
class LocalSweepConfig(SweepConfig):
    """`hydra/launcher=s2train_local`, the default: a torchrun on this machine for each job."""

    _target_: str = "hydra_plugins.s2train.LocalLauncher"
    n_jobs: int = 1  # at a time
    split_gpus: bool = True  # jobs at work together each see GPUs of their own
    grace_s: float = 30.0  # seconds that an interrupted job has to end by itself


@dataclass
class SlurmSweepConfig(SweepConfig):
    """`hydra/launcher=s2train_slurm`: an sbatch script for each job."""

    _target_: str = "hydra_plugins.s2train.SlurmLauncher"
    nodes: int = 1  # of a job
    # sbatch's own, by long name: +hydra.launcher.options.cpus_per_task=8 is --cpus-per-task=8; null leaves one out
    options: dict[str, Any] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)  # shell lines before the job, such as `module load cuda`
    submit: bool = True  # false: only write the scripts
    wait: bool = False  # until all have ended, as sweepers that learn from the losses need


def register() -> None:
    """Put the schemas where Hydra finds them, so that a typo or a wrong type is refused at compose time.

    YAML files may use old names of settings.
    """
    accept_in_files()
    store = ConfigStore.instance()
    store.store(name="pretrain_schema", node=PretrainConfig)
    store.store(name="show_layout_schema", node=ShowLayoutConfig)
    store.store(name="needle_schema", node=NeedleConfig)
    store.store(name="corpus_schema", node=CorpusConfig)
    store.store(name="prepare_schema", node=PrepareConfig)
    store.store(name="export_schema", node=ExportConfig)
    store.store(name="import_schema", node=ImportConfig)
    store.store(group="hydra/launcher", name="s2train_local", node=LocalSweepConfig)
    store.store(group="hydra/launcher", name="s2train_slurm", node=SlurmSweepConfig)


def settings_by_name(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested settings; an empty section has none."""
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from settings_by_name(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def to_object(cfg: DictConfig) -> Any:
    """The dataclass behind a composed config.

    Raises:
        ConfigError: a setting has no value, or something was added that is no setting.
    """
    check_names(cfg)
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        means = meaning(OmegaConf.get_type(cfg) or object, missing[0])
        raise ConfigError(missing[0], "(not set)", "it has no value", f"Set {missing[0]}=…{means and f': {means}'}.")
    return OmegaConf.to_object(cfg)
