"""Checks that a checkpoint can be evaluated, before a device is used."""

from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from s2train.attention.features import Feature
from s2train.attention.hybrid import HybridLayout
from s2train.checkpoints.folders import find_checkpoint, read_config, read_progress
from s2train.checkpoints.integrity import CONFIG, PROGRESS
from s2train.command_line.messages import warn
from s2train.config import PretrainConfig
from s2train.data.tokenizers import Tokenizer, load_tokenizer
from s2train.errors import ConfigError
from s2train.planning import hybrid_layout
from s2train.validation.attention_kinds import require_feature, require_tensor_parallel
from s2train.validation.division import check_tensor_parallel
from s2train.validation.values import longest_sequence


@dataclass(frozen=True)
class Trained:
    """A checkpoint, with the settings of the run that wrote it.

    Attributes:
        checkpoint: the iter_* folder.
    """

    checkpoint: Path
    config: PretrainConfig

    @classmethod
    def find(cls, where: str) -> "Trained":
        """Find a checkpoint; reject weights without settings, which could fit many layouts.

        Raises:
            ConfigError: there is no checkpoint, or its settings are missing or unreadable.
        """
        found = find_checkpoint(where)
        if not (found / CONFIG).is_file():
            problem = f"{found.name} has no {CONFIG}, which describes its layout"
            raise ConfigError("checkpoint", where, problem, f"Copy the run's {CONFIG} into it")
        try:
            layers = OmegaConf.select(OmegaConf.load(found / CONFIG), "layout.layers", throw_on_missing=False)
        except (OSError, ValueError, YAMLError, OmegaConfBaseException):
            layers = None
        if not isinstance(layers, str):
            problem = f"its {CONFIG} has no layout (layout.layers)"
            raise ConfigError("checkpoint", found, problem, "Restore the run's settings there")
        return cls(found, read_config(found))

    def hybrid(self) -> HybridLayout:
        """Build the layout.

        Raises:
            ConfigError: on `checkpoint`: the layout can't be built.
        """
        try:
            return hybrid_layout(self.config)
        except ConfigError as error:  # on a setting that the program does not have
            problem = f"the layout in its {CONFIG} can't be made ({error.given}: {error.problem})"
            raise ConfigError("checkpoint", self.checkpoint, problem, "Restore that file, or what it names") from error

    def check_decoding(self, tp: int) -> None:
        """Check that the model can decode with a cache on `tp` ranks.

        Raises:
            ConfigError: tensor parallel ranks don't divide it, or a layer's kind of attention can't decode.
        """
        check_tensor_parallel(self.config.model, tp, "tp")
        hybrid, remedy = self.hybrid(), "Evaluate a model without such layers"
        require_feature(hybrid, Feature.DECODING, "checkpoint", self.checkpoint, remedy)
        require_tensor_parallel(hybrid, tp, "tp")

    def tokenizer(self, moved: str | None) -> Tokenizer:
        """Load the run's tokenizer.

        Args:
            moved: its new path, if it was moved.
        Raises:
            ConfigError: on `tokenizer`: it can't be loaded, has more ids than the model, or isn't the run's.
        """
        data, rows = self.config.data, self.config.model.vocab_size
        tokenizer = load_tokenizer(moved or data.tokenizer, "tokenizer", data.end_token)
        if tokenizer.vocab_size > rows:
            problem = f"it has {tokenizer.vocab_size:,} ids, but the model has {rows:,}"
            raise ConfigError("tokenizer", tokenizer.name, problem, "Set the one that the run was trained with")
        check_tokenizer(self.checkpoint, tokenizer)
        return tokenizer

    def check_length(self, length: int, setting: str, value: object, remedy: str = "") -> None:
        """Check that the layout covers sequences of `length` tokens.

        Masks of a file cover a limited length, and no layout is built beyond `longest_sequence`. Rotary positions have
        no limit.

        Args:
            setting, value: what asks for that length.
            remedy: what helps besides shorter values.
        Raises:
            ConfigError: it does not.
        """
        if length > (most := longest_sequence(self.config.layout.block_size)):
            problem = f"the checkpoint's layout is built for up to {most:,} tokens"
            raise ConfigError(setting, value, problem, f"Use shorter {setting}{remedy}")
        last = torch.tensor([-(-length // self.config.layout.block_size) - 1])
        try:
            for layer in self.hybrid().layers:
                for head in layer.bound:
                    head.keep(last, last)
        except ConfigError as error:
            problem = f"the checkpoint's layout is shorter ({error.setting}: {error.problem})"
            raise ConfigError(setting, value, problem, f"Use shorter {setting}{remedy}") from error

    def warn_beyond_training(self, length: int) -> None:
        """Warn if `length` tokens exceed the training's sequences."""
        trained = self.config.train.seq_length
        if length > trained:
            warn(f"up to {length:,} tokens; the model was trained on {trained:,}")


def check_tokenizer(checkpoint: Path, tokenizer: Tokenizer, setting: str = "tokenizer") -> None:
    """Check that a tokenizer is the one of a checkpoint's data.

    Earlier checkpoints don't record it.

    Args:
        setting: setting to name in an error.
    Raises:
        ConfigError: it isn't.
    """
    if not (checkpoint / PROGRESS).is_file():
        return
    if read_progress(checkpoint).tokenizer not in (None, tokenizer.fingerprint):
        problem = f"{checkpoint} was trained with another one, or with another content of this file"
        raise ConfigError(setting, tokenizer.name, problem, "Set the one that the run was trained with")
