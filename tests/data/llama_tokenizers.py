"""Small tokenizers that treat blanks as Llama-2's, Mistral's and byte-level ones do."""

import json
import string
from pathlib import Path

import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from s2train.data.tokenizers import Tokenizer, load_tokenizer, train_bpe
from s2train.needles.words import NOISE

TEXTS = [NOISE] * 20 + [
    f"The magic number of {key} is {i}." for key in ("brisk-otter", "icy-eagle") for i in range(1_000_000, 1_000_300)
]
KINDS = ("llama-2", "mistral", "byte-level")
SIZE = 600


def make_tokenizer(kind: str, folder: Path) -> Tokenizer:
    """Train a small tokenizer that handles blanks like the named kind.

    llama-2: a normalizer prepends ▁ and replaces each blank by it; mistral: a pre-tokenizer does; byte-level: neither.
    """
    path = folder / f"{kind}.json"
    if kind == "byte-level":
        train_bpe(TEXTS, SIZE, path)
        return load_tokenizer(str(path))
    made = hf.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # tokens begin at blanks, as in SentencePiece, and each digit is a token
    words = pre_tokenizers.Split("▁", "merged_with_next")
    made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Digits(individual_digits=True)])
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 256,
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
        initial_alphabet=["▁", *string.ascii_letters, *string.digits, *string.punctuation],
    )
    made.train_from_iterator(TEXTS, trainer)
    made.pre_tokenizer = None
    if kind == "mistral":
        made.normalizer = None
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    content = json.loads(made.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    path.write_text(json.dumps(content))
    return load_tokenizer(str(path))
