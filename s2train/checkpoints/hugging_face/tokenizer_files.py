"""Write a run's tokenizer for transformers: tokenizer.json and tokenizer_config.json."""

import json
import shutil
from pathlib import Path

import tokenizers as hf

from s2train.data.tokenizers import END_OF_DOCUMENT_NAMES, FileTokenizer, Tokenizer

TOKENIZER = "tokenizer.json"


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int) -> None:
    """Write both files; an existing `tokenizer.json` is copied, `bytes` is converted.

    Args:
        max_length: maximum number of tokens that the model was trained on.
    """
    if isinstance(tokenizer, FileTokenizer):
        shutil.copyfile(tokenizer.name, folder / TOKENIZER)
    else:
        (folder / TOKENIZER).write_text(byte_tokenizer().to_str(pretty=True) + "\n")
    end = hf.Tokenizer.from_file(str(folder / TOKENIZER)).id_to_token(tokenizer.eod)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "padding_side": "left",  # of a batch of prompts
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],  # not token types, which transformers 4 adds
        "clean_up_tokenization_spaces": False,  # decoded text would lose spaces before punctuation
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def adds_tokens(folder: Path) -> bool:
    """Return whether transformers' tokenizer adds tokens such as <s>.

    Training did not add any.
    """
    return bool(hf.Tokenizer.from_file(str(folder / TOKENIZER)).num_special_tokens_to_add(False))


def byte_tokenizer() -> hf.Tokenizer:
    """Convert `ByteTokenizer` to a byte-level BPE without merges.

    UTF-8 bytes are ids 0 … 255, and 256 is the end of a document.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    # GPT-2's characters for bytes: printable ones map to themselves, the others to U+0100 and following
    vocabulary = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    made = hf.Tokenizer(hf.models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = hf.decoders.ByteLevel()
    made.add_special_tokens([END_OF_DOCUMENT_NAMES[0]])
    return made
