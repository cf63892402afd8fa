"""Compares mask files with the masks that a checkpoint was trained with.

Settings name only the files, whose contents may change.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from s2train.attention.hybrid import HybridLayout
from s2train.errors import ConfigError
from s2train.layouts.patterns import MaskPattern


def mask_digests(hybrid: HybridLayout) -> dict[str, str]:
    """Digest the masks that a model's heads read, by file."""
    digests: dict[str, list[bytes]] = {}
    for number, layer in enumerate(hybrid.layers):
        for head, pattern in enumerate(layer.bound):
            if isinstance(pattern, MaskPattern):
                digests.setdefault(pattern.file, []).append(f"{number} {head} ".encode() + pattern.digest)
    return {file: hashlib.blake2b(b"".join(own), digest_size=16).hexdigest() for file, own in digests.items()}


def check_masks(saved: Mapping[str, str], now: Mapping[str, str], checkpoint: Path, setting: str) -> None:
    """Check that files hold the masks of a checkpoint.

    Earlier checkpoints record none, and fit any.

    Args:
        saved, now: digests by file.
        setting: setting to name in an error.
    Raises:
        ConfigError: a file holds others.
    """
    for file, digest in now.items():
        if saved.get(file, digest) != digest:
            problem = f"it was trained with other masks than {file} holds now"
            raise ConfigError(setting, checkpoint, problem, "Restore that file, and write new masks to another one")
