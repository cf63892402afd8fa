"""What was measured of a checkpoint's attention, in one .npz file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from s2train.config import ModelConfig
from s2train.errors import ConfigError, message_line
from s2train.files import UNREADABLE_ARRAYS, replacing
from s2train.kernels.block_statistics.effects import SUMS
from s2train.rope_scaling import RopeScalingConfig
from s2train.semsa.rules import Rule

_VERSION = 1


@dataclass(frozen=True)
class Profile:
    """Effects on the loss, summed over samples and rows, in nats.

    See `s2train.kernels.block_statistics`.

    Attributes:
        blocks: float32 [4, layers, heads, n, n], in the order of `SUMS`, of removing one key block from the rows of a
            query block.
        rules: float32 [4, layers, heads, rules, n], of what each rule drops from the rows of a query block.
        columns: int64 [layers, heads, n], key blocks that `Rule.of_group` takes; None without such rules.
        about: what was measured and how, as plain values.
    """

    blocks: np.ndarray
    rules: np.ndarray
    columns: np.ndarray | None
    about: Mapping[str, Any]

    @property
    def library(self) -> tuple[Rule, ...]:
        return tuple(Rule(settings) for settings in self.about["rules"])

    @property
    def model(self) -> ModelConfig:
        given = dict(self.about["model"])  # profiles made before RoPE was scaled have no settings of it
        return ModelConfig(**given | {"rope_scaling": RopeScalingConfig(**given.get("rope_scaling", {}))})

    @property
    def block_size(self) -> int:
        return int(self.about["block_size"])

    @property
    def seq_length(self) -> int:
        return int(self.about["seq_length"])

    @property
    def tokens(self) -> int:
        """Tokens with a loss, of all samples."""
        return int(self.about["tokens"])

    def settings_of(self, rule: int, layer: int, head: int) -> dict[str, Any]:
        """Return the settings of a head's pattern under a rule."""
        columns = () if self.columns is None else self.columns[layer, head].tolist()
        return self.library[rule].of_group(head // group_size(self.model), columns)

    def costs(self, name: str, num_blocks: int | None = None) -> np.ndarray:
        """Estimate what each rule does to a head: float64 [layers, heads, rules].

        `squared` is half the sum of squares over the tokens: the second-order estimate of the change of a calibrated
        model's loss per token. `signed` is the first-order one. `absolute` and `mass` are sums over the tokens too.

        Args:
            num_blocks: sum over so many query blocks, from the first; None: all.
        """
        of_rows = self.rules[SUMS.index(name), ..., :num_blocks].astype(np.float64).sum(-1)
        blocks = self.rules.shape[-1]
        share = min(num_blocks or blocks, blocks) / blocks
        costs: np.ndarray = of_rows / (self.tokens * share) / (2 if name == "squared" else 1)
        return costs

    def save(self, path: Path) -> None:
        """Write it; an interruption leaves the old file or the new one."""
        arrays = {"blocks": self.blocks, "rules": self.rules}
        if self.columns is not None:
            arrays["columns"] = self.columns
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, about=np.array(json.dumps(dict(self.about))), **arrays)  # type: ignore[arg-type]


def load_profile(path: str | Path, setting: str = "profile") -> Profile:
    """Read a profile.

    Raises:
        ConfigError: there is no such file, or it is none of `Profile.save`.
    """
    remedy = "Name an .npz file that launch/profile_attention.py wrote."
    try:
        with np.load(path, allow_pickle=False) as arrays:
            columns = arrays.get("columns")
            about = json.loads(str(arrays["about"]))
            if about["version"] != _VERSION:
                raise ValueError(f"version {about['version']}")
            return Profile(arrays["blocks"], arrays["rules"], columns, about)
    except FileNotFoundError as error:
        raise ConfigError(setting, path, "there is no such file", remedy) from error
    except UNREADABLE_ARRAYS as error:
        is_advice = "allow_pickle" in str(error)  # numpy's, for files that are no arrays
        why = "" if is_advice else f" ({message_line(error)})"
        raise ConfigError(setting, path, f"is no profile{why}", remedy) from error


def check_same_model(profile: Profile, weights: str, path: str, checkpoint: Path, setting: str = "profile") -> None:
    """Check that a profile was made of these weights.

    Raises:
        ConfigError: it is another model's.
    """
    if profile.about["weights"] != weights:
        problem = f"is of {profile.about['checkpoint']} (weights {profile.about['weights']}), not of {checkpoint}"
        raise ConfigError(setting, path, f"{problem} ({weights})", "Profile this checkpoint.")


def ranked_columns(blocks: np.ndarray, num_query_groups: int, local: int = 1) -> np.ndarray:
    """Order key blocks by their KV group's squared effects beyond the window.

    The result is int64 [layers, heads, n].

    Args:
        blocks: float [4, layers, heads, n, n].
        local: distances below it don't count.
    """
    squared = blocks[SUMS.index("squared")].astype(np.float64)
    layers, heads, n, _ = squared.shape
    far = np.tri(n, k=-local, dtype=bool)
    of_head = (squared * far).sum(2)
    of_group = of_head.reshape(layers, num_query_groups, -1, n).sum(2)
    order = np.argsort(-of_group, axis=-1, kind="stable")
    ranked: np.ndarray = np.repeat(order, heads // num_query_groups, axis=1)
    return ranked


def group_size(model: ModelConfig) -> int:
    """Return how many query heads share a KV head."""
    return model.num_attention_heads // model.num_query_groups


def about_profile(rules: Sequence[Rule], **values: Any) -> dict[str, Any]:
    """Collect what `Profile.about` holds."""
    return {"version": _VERSION, "rules": [dict(rule.settings) for rule in rules], **values}
