"""Text appears as soon as its characters are complete, in the order of the prompts."""

import io
import random
from pathlib import Path

import pytest

from s2train.data.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer, train_bpe
from s2train.generation.text import Terminal, TextStream

TEXT = "Zwölf Boxkämpfer jagen Viktor 🥊 quer über den großen Sylter Deich. 日本語のテキスト. " * 3


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "bytes":
        return ByteTokenizer()
    train_bpe([TEXT], 300, tmp_path / "tokenizer.json")
    return FileTokenizer(tmp_path / "tokenizer.json")


def parts(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*map(stream.add, tokens), stream.end()]


def test_the_parts_are_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    cut = random.randrange(1, 5)  # within "Zwölf", whose ö has two bytes: not before it ends
    while tokenizer.decode(ids[:cut]).endswith("\ufffd"):
        cut += 1
    found = parts(tokenizer, ids[:cut], ids[cut:])
    assert tokenizer.decode(ids[:cut]) + "".join(found) == TEXT
    assert sum(map(bool, found)) > 20


def test_no_part_holds_half_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert not any("\ufffd" in part for part in parts(tokenizer, ids[:1], ids[1:]))


def test_a_character_that_stays_incomplete_appears_at_the_end() -> None:
    first, second, third, _ = "🥊".encode()
    assert parts(ByteTokenizer(), [97], [98, first, second, third]) == ["b", "", "", "", "\ufffd"]


def test_random_bytes_give_what_decoding_them_together_gives() -> None:
    tokenizer = ByteTokenizer()
    ids = [random.randrange(256) for _ in range(300)]
    assert "".join(parts(tokenizer, [97], ids)) == tokenizer.decode(ids)


def test_one_text_appears_at_once_and_has_no_title() -> None:
    out = io.StringIO()
    terminal = Terminal(out, [""])
    terminal.add(0, "one ")
    assert out.getvalue() == "one "
    terminal.add(0, "two")
    terminal.finish(0)
    assert out.getvalue() == "one two\n"


def test_texts_appear_below_each_other() -> None:
    out = io.StringIO()
    terminal = Terminal(out, ["first", "second", "third"])
    for number in (2, 1, 0):
        terminal.add(number, f"{number}a ")
    assert out.getvalue() == "first\n0a "
    terminal.finish(1)
    terminal.finish(0)
    assert out.getvalue() == "first\n0a \nsecond\n1a \nthird\n2a "
    terminal.add(2, "2b")
    terminal.finish(2)
    assert out.getvalue().endswith("third\n2a 2b\n")


def test_without_streaming_a_text_appears_when_it_is_complete() -> None:
    out = io.StringIO()
    terminal = Terminal(out, ["first"], waits=True)
    terminal.add(0, "a")
    assert out.getvalue() == ""
    terminal.finish(0)
    assert out.getvalue() == "first\na\n"
