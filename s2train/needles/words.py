"""Draws needles' words and numbers, and reads haystacks.

Keys and values that evaluation asks for never occur in training: each belongs to one split by its hash. The noise
follows RULER's haystack (Hsieh et al., 2024, arXiv:2404.06654).
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from s2train.errors import ConfigError

Split = Literal["train", "eval"]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
EVAL_SHARE = 5  # one string in five is reserved for evaluation

_ADJECTIVES = """
able amber bold brave brisk calm clever coral crisp daring dusty eager early faint fancy fierce gentle giant
glad golden grand happy hasty hidden humble icy ivory jolly keen kind lively lucky mellow misty modest noble
olive plain proud quick quiet rapid rosy rustic silent silver swift tidy warm witty"""
_NOUNS = """
anchor badger basket beacon bishop bridge candle canyon castle cedar cobra comet copper dragon eagle falcon
feather forest garden glacier hammer harbor hunter island jacket kettle lantern lemon lion marble meadow
mirror monkey orchid otter paddle pepper pilot planet rabbit ribbon river saddle sailor sparrow temple tiger
tunnel valley violin walnut wizard"""
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()


def split_of(text: str) -> Split:
    """Split of a key or a value, the same on every machine."""
    return "eval" if zlib.crc32(text.encode()) % EVAL_SHARE == 0 else "train"


def draw_pair(rng: np.random.Generator, split: Split) -> tuple[str, str]:
    """Draw a key and a value of `split`.

    Keys are words such as ``brisk-otter``, values seven digits.
    """
    key = value = ""
    while not key or split_of(key) != split:
        key = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    while not value or split_of(value) != split:
        value = str(rng.integers(1_000_000, 10_000_000))
    return key, value


def text_haystack(paths: Sequence[Path], setting: str = "haystack") -> str:
    """Read the concatenated text of `paths` as a haystack.

    Raises:
        ConfigError: on `setting`; a file can't be read or holds no text.
    """
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            problem = f"can't be read ({error.strerror})"
            raise ConfigError(setting, path, problem, "Set noise, a UTF-8 text file, or [file, …]") from error
        except UnicodeDecodeError as error:  # with replacement characters it would be evaluated as if it were text
            problem = f"is not UTF-8 ({error.reason} at byte {error.start})"
            raise ConfigError(setting, path, problem, "Convert it, e.g. with iconv") from error
        if not texts[-1].strip():
            raise ConfigError(setting, path, "holds no text", "Set a file with sentences")
    return "\n".join(texts)
