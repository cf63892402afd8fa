"""Formats the summary that `launch/prepare_data.py` prints."""

import numpy as np
import numpy.typing as npt

from s2train.config import DataConfig
from s2train.data.indexed import Metadata
from s2train.data.splits import more_documents, split_documents_range
from s2train.data.tokenizers import Tokenizer

_LISTED_FILES = 5  # further ones are only counted


def summary(prefix: str, made: Metadata, lengths: npt.NDArray[np.int32], tokenizer: Tokenizer) -> list[str]:
    """Describe a prepared dataset in a few lines.

    Args:
        lengths: tokens of each document, including its end.
    """
    lines = [
        f"{prefix}: {_count(made.documents, 'document')}, {made.tokens:,} tokens of {made.vocab_size:,} ids"
        f" ({made.tokenizer}), unigram entropy {made.unigram_entropy:.4f} nats per token",
        f"tokens per document: {_distribution(lengths)}",
        f"end of document: {'' if made.end_token is None else f'{made.end_token}, '}id {tokenizer.eod}",
    ]
    if made.formats:
        files = (f"{name} ({_count(count, 'file')})" for name, count in made.formats.items())
        lines.append(f"read as: {', '.join(files)}")
    texts = sum(count for name, count in made.formats.items() if name.startswith("text"))
    if made.files_cut:
        lines.append(
            f"cut: {_count(made.files_cut, 'text file')} into {_count(made.documents_cut, 'document')} of"
            f" {made.document_chars:,} characters or more (document_chars), shuffled"
        )
    elif texts:
        lines.append("cut: nothing; each text file is one document (set document_chars to cut them)")
    if made.blank_rows:
        lines.append(f"left out: {_count(made.blank_rows, 'row')} without text")
    if made.replaced_surrogates:
        lines.append(f"replaced by U+FFFD: {_count(made.replaced_surrogates, 'lone surrogate')}")
    if empty := made.files_without_text:
        more = f" and {len(empty) - _LISTED_FILES:,} more" if len(empty) > _LISTED_FILES else ""
        lines.append(f"skipped: {', '.join(empty[:_LISTED_FILES])}{more}: no text")
    split = DataConfig().split
    if not split_documents_range(split, made.documents)[1]:
        remedy = more_documents(made.documents)
        problem = f"without data.valid_path, data.split={split} would leave the held-out part without a document"
        lines.append(f"note: {problem}. {remedy}")
    return lines


def _distribution(lengths: npt.NDArray[np.int32]) -> str:
    if lengths.min() == lengths.max():
        return f"{lengths[0]:,}"
    least, low, median, high, most = (round(value) for value in np.percentile(lengths, [0, 10, 50, 90, 100]))
    return f"{least:,} shortest, {low:,} (10 %), {median:,} median, {high:,} (90 %), {most:,} longest"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
