"""Long texts are encoded in segments, with the ids of the whole text."""

import random
from typing import Any

import pytest
import tokenizers as hf

from s2train.data.bundled import bundled_corpus_files
from s2train.data.long_texts import encode_long

CORPUS = bundled_corpus_files()[0].read_text()
TRAINING = [CORPUS[start : start + 3000] for start in range(0, 60_000, 3000)]


def bytes_bpe() -> hf.Tokenizer:
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    return trained(tokenizer, hf.trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))


def llama() -> hf.Tokenizer:
    """Like Llama 2's: a blank is prepended, and no pre-tokenizer splits words."""
    tokenizer = hf.Tokenizer(hf.models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = hf.normalizers.Sequence([hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")])
    return trained(tokenizer, hf.trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False))


def unigram() -> hf.Tokenizer:
    tokenizer = hf.Tokenizer(hf.models.Unigram())
    tokenizer.normalizer = hf.normalizers.NFKC()
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    return trained(
        tokenizer,
        hf.trainers.UnigramTrainer(
            vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], n_sub_iterations=1, show_progress=False
        ),
    )


def word_piece() -> hf.Tokenizer:
    tokenizer = hf.Tokenizer(hf.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = hf.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    return trained(
        tokenizer, hf.trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
    )


def trained(tokenizer: hf.Tokenizer, trainer: Any) -> hf.Tokenizer:
    tokenizer.train_from_iterator(TRAINING, trainer=trainer)
    return tokenizer


def some_text() -> str:
    length, start = random.randint(700, 6000), random.randint(0, 100_000)
    return random.choice(
        [
            CORPUS[start : start + length],
            "".join(random.choices("ab é—🦊\n東", k=length)),
            "a" * length,
            "".join(random.choices("ab", k=length)) + " end",
        ]
    )


@pytest.mark.parametrize("make", [bytes_bpe, llama, unigram, word_piece])
def test_ids_are_those_of_the_whole_text(make: Any) -> None:
    tokenizer = make()
    for _ in range(20):
        text = some_text()
        ids = encode_long(tokenizer, text, segment=600, overlap=200)
        assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids, text


class Counting:
    """A tokenizer that records the longest text it encodes."""

    def __init__(self, tokenizer: hf.Tokenizer) -> None:
        self._tokenizer, self.longest = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._tokenizer, name)

        def counted(texts: Any, **settings: Any) -> Any:
            self.longest = max(self.longest, *map(len, [texts] if isinstance(texts, str) else texts), 0)
            return method(texts, **settings)

        return counted


@pytest.mark.parametrize("make", [bytes_bpe, llama])
def test_a_text_of_words_is_never_encoded_as_a_whole(make: Any) -> None:
    tokenizer = Counting(make())
    encode_long(tokenizer, CORPUS[:50_000], segment=2000, overlap=400)  # type: ignore[arg-type]
    assert tokenizer.longest == 2000
