"""Encodes a piece of text as inside a longer text.

A tokenizer may give other ids for the piece alone.
"""

from s2train.data.tokenizers import Offsets, Tokenizer
from s2train.errors import ConfigError

_BEFORE = (".", "\n", "x")


def encode_inside(tokenizer: Tokenizer, text: str) -> tuple[list[int], Offsets]:
    """Encode `text` as it would be after other text.

    Llama-2's and Mistral's tokenizers prepend a blank to any text they encode: encoded alone, " 7." has two blanks.

    Returns:
        Ids, and the characters of each in `text` as (start, stop).
    Raises:
        ConfigError: the tokenizer merges the beginning of `text` with any text before it.
    """
    for before in _BEFORE:
        ids, offsets = tokenizer.encode_with_offsets(before + text)
        first = next((i for i, (_, stop) in enumerate(offsets) if stop > len(before)), len(ids))
        if first == len(ids) or offsets[first][0] >= len(before):
            return ids[first:], [(start - len(before), stop - len(before)) for start, stop in offsets[first:]]
    problem = f"it merges the beginning of {text!r} and the text before it into one token"
    raise ConfigError("tokenizer", tokenizer.name, problem, "Use one that begins a token at each blank")


def prepends_blank(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer prepends a blank to the text it encodes.

    If so, a text should not begin with a blank itself.
    """
    return tokenizer.encode("x") == encode_inside(tokenizer, " x")[0]
