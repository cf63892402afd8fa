"""Settings of the programs that profile checkpoints, and choose and measure layouts."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from s2train import config


@dataclass
class CalibrationDataConfig:
    """Text to profile and evaluate a checkpoint on; None: its run's."""

    path: Any = (
        None  # datasets, as in a run's data.path; held-out data are then `valid_path`, or divided off by `split`
    )
    valid_path: Any = None  # datasets to evaluate on, as in a run's data.valid_path
    split: Any = None  # weights of train and held-out data: profiles take the former, evaluations the latter
    tokenizer: str | None = None  # where the run's tokenizer.json was moved to
    cache: str = "runs/data/cache"  # Megatron's document and shuffle indices


@dataclass
class LibraryConfig:
    """Rules that a head may get, in blocks.

    At most 64, including `dense`.
    """

    # [[base, slope], …]: the last base + slope · n blocks, where n is the number of blocks up to the query
    spans: Any = field(
        default_factory=lambda: [[1, 0], [2, 0], [4, 0], [8, 0], [16, 0], [2, 0.125], [2, 0.25], [2, 0.5]]
    )
    # [[local, stride], …]: the last `local` blocks and every stride-th block, at the offset KV head modulo stride
    stripes: Any = field(default_factory=lambda: [[1, 4], [1, 8], [4, 8], [4, 16]])
    # [[local, count], …]: the last `local` blocks and the `count` columns that matter most to the KV group in
    # `columns_from`
    columns: Any = field(default_factory=list)
    sinks: int = 1  # first blocks, which every rule keeps
    dense: bool = True  # every block


@dataclass
class ProfileAttentionConfig:
    """A run of `launch/profile_attention.py`."""

    checkpoint: str = MISSING  # dense: a run folder, its checkpoints folder, or one iter_* in it
    output: str = MISSING  # .npz file to write
    data: CalibrationDataConfig = field(default_factory=CalibrationDataConfig)
    library: LibraryConfig = field(default_factory=LibraryConfig)  # candidate rules, whose effects are summed
    columns_from: str | None = None  # profile of the same checkpoint that `library.columns` are taken from
    samples: int = 64  # sequences of calibration text, over all data parallel ranks
    seq_length: int | None = None  # tokens of a sequence, at most the run's train.seq_length; None: that length
    block_size: int | None = None  # tokens of a block, here and in the chosen layout; None: the run's layout.block_size
    labels: str = "sampled"  # sampled (from the model's own output, softened by `temperature`), or data (next tokens)
    temperature: float = 1.0  # logits are divided by it before labels are sampled
    precision: str | None = None  # bf16, fp32; None: the run's
    recompute: bool = False  # compute each layer's activations again in the backward pass: slower, less memory
    save_interval: int = 8  # samples per data parallel rank after which sums are saved, to resume from
    # compare the estimates with the loss under real masks of this number of blocks and of rules, one at a time
    verify: int = 0
    verify_samples: int = 4  # sequences on which each mask is tried
    attention_backend: str = "auto"  # as in a run
    tp: int = 1  # tensor model parallel; the remaining processes share the samples
    seed: int = 1234  # seed of sampled labels, and of the blocks to verify
    overwrite: bool = False


@dataclass
class ChooseLayoutConfig:
    """A run of `launch/choose_layout.py`."""

    profile: str = MISSING  # .npz file of launch/profile_attention.py
    output: str = MISSING  # .yaml file to write, for layout=file:…; its picture and figures go to the same folder
    # largest share of causal query-key pairs in the blocks that heads keep, on average over all heads of all layers; or
    # a list, one for each length
    density: Any = 0.25
    # tokens of sequences that keep to `density`, up to the profile's; their costs are averaged; None: the profile's
    lengths: list[int] | None = None
    cost: str = "squared"  # sum to minimise: squared, absolute or signed effects, or mass (dropped probability)
    whole_groups: bool = True  # the query heads of a KV head get the same rule, and load keys and values once
    kv_efficient: bool = True  # only rules whose dropped keys are never read again, so that decoding frees them
    rules: list[int] | None = None  # rules to choose from, by their numbers in the printed table; None: all
    tp: int = 1  # tensor parallel ranks that shall keep about equally many blocks in each layer
    imbalance: float = 0.1  # by which share of their mean a rank may exceed it
    time_limit: float = 60.0  # seconds for the solver; a solution that is not proven best is reported with its gap
    overwrite: bool = False


@dataclass
class FrontierNeedlesConfig:
    """Needle retrieval under each layout.

    Its trials are those of `launch/needle.py`.
    """

    lengths: list[int] | None = None  # tokens, prompt and answer together, up to the profile's; None: no retrieval
    task: str = "single"  # what is hidden and asked for, with the task's default settings; see s2train/needles/tasks.py
    # text around the needles: noise (RULER's repeated sentences), bundled, a text file, or [file, …]
    haystack: Any = "noise"
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])  # as in launch/needle.py
    depth_jitter: float = 0.05  # as in launch/needle.py
    trials: int = 20  # per length and depth
    batch_size: int = 1  # documents in one forward pass
    seed: int = 1234  # seed of keys, values and the start in the haystack


@dataclass
class FrontierConfig:
    """A run of `launch/layout_frontier.py`."""

    checkpoint: str = MISSING  # the profiled checkpoint
    profile: str = MISSING  # .npz file of launch/profile_attention.py
    # .json file to write, after every layout; the picture goes to the same folder. The same command resumes, and
    # measures nothing twice
    output: str = MISSING
    layouts: str | None = None  # folder to write each layout to, for layout=file:…; None: write none
    data: CalibrationDataConfig = field(default_factory=CalibrationDataConfig)
    densities: list[float] = field(default_factory=lambda: [0.1, 0.15, 0.25, 0.4, 0.6])
    samples: int = 16  # held-out sequences, over all data parallel ranks
    # exact answers to needles beside the loss: for checkpoints that learned to retrieve
    needles: FrontierNeedlesConfig = field(default_factory=FrontierNeedlesConfig)
    whole_groups: bool = True  # as in launch/choose_layout.py
    draws: int = 3  # random layouts at each density
    attention_backend: str = "auto"  # as in a run
    tp: int = 1  # tensor model parallel; the remaining processes share the samples
    seed: int = 1234  # seed of random layouts
    overwrite: bool = False


def register() -> None:
    """Register these schemas with Hydra."""
    config.register(
        {
            "profile_attention": ProfileAttentionConfig,
            "choose_layout": ChooseLayoutConfig,
            "layout_frontier": FrontierConfig,
        }
    )
