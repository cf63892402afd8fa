"""Text to profile and evaluate on, and the loss measured there."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2train.attention.random_numbers import stateless_seed
from s2train.checkpoints.folders import find_checkpoint, read_config
from s2train.checkpoints.inference_model import Loaded, load_for_inference
from s2train.checkpoints.trained import check_tokenizer
from s2train.config import PretrainConfig
from s2train.data.checks import check_data
from s2train.data.datasets import build_datasets
from s2train.data.tokenizers import Tokenizer, load_tokenizer
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError, from_to
from s2train.megatron.model import unwrap
from s2train.planning import hybrid_layout
from s2train.planning.checks import check_attention_backend
from s2train.preparation.bundled_corpus import ensure_prepared
from s2train.semsa.config import CalibrationDataConfig
from s2train.semsa.core_attention import studied_layout
from s2train.validation.division import check_tensor_parallel, check_whole_models
from s2train.validation.values import check_seed

Sample = dict[str, Tensor]


@dataclass(frozen=True)
class Labels:
    """Labels of the loss: the data's, or samples of the softened model.

    `kind` is `data` or `sampled`.
    """

    kind: str
    temperature: float = 1.0

    def __str__(self) -> str:
        return "data" if self.kind == "data" else f"sampled, temperature {self.temperature:g}"


DATA = Labels("data")


@dataclass(frozen=True)
class Subject:
    """A dense checkpoint, and its data, checked before anything is built.

    Attributes:
        checkpoint: the iter_* folder.
        trained: the run's settings.
        cfg: the same with the data, length and seed of this program.
    """

    checkpoint: Path
    trained: PretrainConfig
    cfg: PretrainConfig
    tokenizer: Tokenizer


def read_subject(
    checkpoint: str,
    data: CalibrationDataConfig,
    *,
    seq_length: int | None,
    held_out: bool,
    tp: int,
    seed: int,
    attention_backend: str,
    world_size: int,
    hardware: Hardware,
) -> Subject:
    """Check a checkpoint, its data and the division.

    Args:
        held_out: whether held-out data are needed beside training data.
    Raises:
        ConfigError: a setting can't work, a file is missing, or the checkpoint isn't dense.
    """
    check_seed(seed)
    check_attention_backend(attention_backend, hardware)
    path = find_checkpoint(checkpoint)
    trained = read_config(path)
    _check_dense(trained, path)
    check_whole_models(tp, world_size)
    check_tensor_parallel(trained.model, tp, "tp")
    length = trained.train.seq_length if seq_length is None else seq_length
    if not 2 <= length <= trained.train.seq_length:
        problem = f"{path} was trained with {trained.train.seq_length:,} tokens, and does not know longer sequences"
        raise ConfigError("seq_length", length, problem, f"Set it to {from_to(2, trained.train.seq_length)}.")
    cfg = with_data(trained, data, length, held_out, seed)
    tokenizer = load_tokenizer(cfg.data.tokenizer, end_token=cfg.data.end_token)
    check_tokenizer(path, tokenizer, "data.tokenizer")
    ensure_prepared(cfg)
    check_data(cfg, tokenizer)
    return Subject(path, trained, cfg, tokenizer)


def _check_dense(trained: PretrainConfig, path: Path) -> None:
    if masked := [number for number, layer in enumerate(hybrid_layout(trained).layers) if not layer.is_dense]:
        layers = f"layer{'s' if len(masked) > 1 else ''} {', '.join(map(str, masked[:4]))}{', …' if masked[4:] else ''}"
        problem = f"its {layers} don't attend to everything: what is masked has no effect to measure"
        raise ConfigError("checkpoint", path, problem, "Profile a dense checkpoint, from before the switch.")
    if trained.data.attention_within_documents:
        problem = "it attends within documents only (data.attention_within_documents), which profiles don't"
        raise ConfigError("checkpoint", path, problem, "Profile a checkpoint that attends to whole sequences.")


def with_data(
    trained: PretrainConfig, data: CalibrationDataConfig, seq_length: int, held_out: bool, seed: int
) -> PretrainConfig:
    own: dict[str, Any] = {"cache": data.cache}
    if data.path is not None:
        own |= {"path": data.path, "valid_path": None}
    for name in ("valid_path", "split", "tokenizer"):
        if getattr(data, name) is not None:
            own[name] = getattr(data, name)
    return replace(
        trained,
        data=replace(trained.data, **own),
        train=replace(trained.train, seq_length=seq_length),
        evaluation=replace(trained.evaluation, interval=int(held_out)),
        seed=seed,
    )


def load_studied(
    subject: Subject,
    device: torch.device,
    *,
    block_size: int,
    tp: int,
    attention_backend: str,
    precision: str | None = None,
    recompute: bool = False,
) -> Loaded:
    """Load the model with attention that can be observed and masked.

    Its weights are frozen. Gradients begin at the embedding's output.
    """
    hybrid = studied_layout(subject.trained.model, block_size)
    loaded = load_for_inference(
        subject.checkpoint, device, tp, attention_backend, hybrid=hybrid, seq_length=subject.cfg.train.seq_length,
        precision=precision, recompute="full" if recompute else "none",
    )  # fmt: skip
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)

    def begin(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.requires_grad_() if torch.is_grad_enabled() else output

    unwrap(loaded.model).embedding.register_forward_hook(begin)
    loaded.model.train(recompute)  # Megatron recomputes in train mode only; there is no dropout
    return loaded


def samples(subject: Subject, count: int, *, held_out: bool, rank: int = 0, ranks: int = 1) -> Iterator[Sample]:
    """Yield this rank's part of the first `count` samples; collective.

    A sample holds tokens, labels and loss_mask, [1, s].
    """
    sizes = (1, count) if held_out else (count, 0)
    parts = build_datasets(subject.cfg, subject.tokenizer, *sizes)
    dataset: Any = parts[held_out]
    for index in range(rank, count, ranks):
        sample = dataset[index]
        yield {name: torch.as_tensor(sample[name])[None] for name in ("tokens", "labels", "loss_mask")}


def token_losses(
    model: torch.nn.Module,
    sample: Sample,
    device: torch.device,
    labels: Labels = DATA,
    *,
    vocab_size: int = 0,
    seed: int = 0,
) -> Tensor:
    """Compute each token's loss, float32 [b, s]; 0 where it doesn't count.

    Args:
        vocab_size: for sampled labels: ids below it can be sampled; further rows of the output pad it.
        seed: of sampled labels.
    """
    tokens = sample["tokens"].to(device)
    positions = torch.arange(tokens.shape[1], device=device)[None].expand_as(tokens)
    logits = model(tokens, positions, None).float()
    target = sample["labels"].to(device)
    if labels.kind == "sampled":
        generator = torch.Generator(device).manual_seed(seed)
        with torch.no_grad():  # the largest of logits with Gumbel noise is a sample of their softmax
            uniform = torch.rand((*logits.shape[:2], vocab_size), generator=generator, device=device)
            noise = -(-uniform.clamp(1e-12, 1 - 1e-7).log()).log()
            target = (logits[..., :vocab_size] / labels.temperature + noise).argmax(-1)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    return losses * sample["loss_mask"].to(device)


def label_seed(seed: int, sample: int) -> int:
    """Return the seed of a sample's labels, the same under every division."""
    return stateless_seed(seed, sample, "labels")
