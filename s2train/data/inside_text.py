"""Token ids of a piece of text as they are inside a longer text, which a tokenizer need not give for it alone."""

from s2train.data.tokenizers import Offsets, Tokenizer
from s2train.errors import ConfigError

_BEFORE = (".", "\n", "x")


def encode_inside(tokenizer: Tokenizer, text: str) -> tuple[list[int], Offsets]:
    """Ids of `text` after other text, and each one's characters in `text` (start, stop).

    Llama-2's and Mistral's tokenizers put a blank before whatever they encode: alone, " 7." has two of them.

    Raises:
        ConfigError: the tokenizer makes one token of the beginning of `text` and whatever is before it.
    """
    for before in _BEFORE:
        ids, offsets = tokenizer.encode_with_offsets(before + text)
        first = next((i for i, (_, stop) in enumerate(offsets) if stop > len(before)), len(ids))
        if first == len(ids) or offsets[first][0] >= len(before):
            return ids[first:], [(start - len(before), stop - len(before)) for start, stop in offsets[first:]]
    problem = f"it makes one token of the beginning of {text!r} and what is before it"
    raise ConfigError("tokenizer", tokenizer.name, problem, "Use one that begins a token at each blank")


def prepends_blank(tokenizer: Tokenizer) -> bool:
    """Whether it puts a blank before what it encodes, so that a text should not begin with one itself."""
    return tokenizer.encode("x") == encode_inside(tokenizer, " x")[0]
