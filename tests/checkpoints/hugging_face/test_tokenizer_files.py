"""Tokenizers beside an export, as transformers loads them."""

import json
import random
from pathlib import Path

import pytest
import tokenizers as hf

from s2train.checkpoints.hugging_face.tokenizer_files import adds_tokens, byte_tokenizer, write_tokenizer
from s2train.data.tokenizers import ByteTokenizer, load_tokenizer
from tests.data.llama_tokenizers import KINDS, make_tokenizer


def test_bytes_are_written_as_a_tokenizer_of_the_same_ids(tmp_path: Path) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    written, plain = load_tokenizer(str(tmp_path / "tokenizer.json")), ByteTokenizer()
    assert (written.vocab_size, written.eod) == (plain.vocab_size, plain.eod)
    characters = [chr(random.choice([random.randrange(32, 127), random.randrange(0xD7FF)])) for _ in range(300)]
    text = "<|endoftext|> a  b\r\n\t" + "".join(characters)
    assert written.encode(text) == plain.encode(text)
    assert written.decode(plain.encode(text)) == text
    every = list(range(256))
    assert written.decode(every).replace("\N{REPLACEMENT CHARACTER}", "") == plain.decode(every).replace(
        "\N{REPLACEMENT CHARACTER}", ""
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizers_file_is_copied_and_its_end_of_document_named(kind: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(kind, tmp_path)
    folder = tmp_path / "export"
    folder.mkdir()
    write_tokenizer(folder, tokenizer, 512)
    assert (folder / "tokenizer.json").read_bytes() == Path(tokenizer.name).read_bytes()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    end = "<|endoftext|>" if kind == "byte-level" else "</s>"
    assert (config["eos_token"], config["model_max_length"]) == (end, 512)
    assert (config["pad_token"], config["padding_side"]) == (end, "left")
    assert config["model_input_names"] == ["input_ids", "attention_mask"]  # all that an export's `generate` takes
    assert not adds_tokens(folder)


def test_a_tokenizer_that_adds_tokens_by_itself_is_recognized(tmp_path: Path) -> None:
    made = hf.Tokenizer.from_file(make_tokenizer("llama-2", tmp_path).name)
    made.post_processor = hf.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(tmp_path / "tokenizer.json"))
    assert adds_tokens(tmp_path)
