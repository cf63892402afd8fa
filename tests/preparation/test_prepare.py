import gzip
import hashlib
import json
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from s2train.data.bundled import bundled_corpus_files
from s2train.data.indexed import read_document_lengths, read_metadata
from s2train.data.tokenizers import load_tokenizer
from s2train.errors import ConfigError
from s2train.preparation.config import PrepareConfig
from s2train.preparation.prepare import prepare, spread_order
from s2train.preparation.progress import Meter


def documents(prefix: str) -> list[str]:
    metadata = read_metadata(prefix)
    assert metadata is not None
    tokenizer = load_tokenizer(metadata.tokenizer)
    dataset = IndexedDataset(prefix)
    assert all(dataset[i][-1] == tokenizer.eod for i in range(len(dataset)))
    return [tokenizer.decode(dataset[i].tolist()) for i in range(len(dataset))]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:500"])
def test_tokens_decode_to_the_input_texts(tmp_path: Path, tokenizer: str) -> None:
    output = str(tmp_path / "sub" / "out")
    prepare(PrepareConfig(input="bundled", output=output, tokenizer=tokenizer, document_chars=5000))
    cut = documents(output)
    for file in bundled_corpus_files():
        text = file.read_text()
        rest = sorted((document for document in cut if document in text), key=text.index)
        assert "".join(rest) == text
    assert sum(map(len, cut)) == sum(len(file.read_text()) for file in bundled_corpus_files())


def test_the_sidecar_records_how_the_data_were_made(corpus: str) -> None:
    metadata = read_metadata(corpus)
    assert metadata is not None
    assert (metadata.tokenizer, metadata.vocab_size) == ("bytes", 257)
    assert metadata.documents == len(IndexedDataset(corpus))
    assert metadata.tokens == Path(f"{corpus}.bin").stat().st_size // 2 == read_document_lengths(corpus).sum()
    assert metadata.sources == {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in bundled_corpus_files()
    }
    tokens = np.fromfile(f"{corpus}.bin", dtype=np.uint16)
    p = np.bincount(tokens) / len(tokens)
    assert metadata.unigram_entropy == pytest.approx(-np.log(p[tokens]).mean())


def test_the_last_tenth_holds_documents_of_every_source(corpus: str) -> None:
    cut = documents(corpus)
    held_out = cut[round(0.9 * len(cut)) :]
    for file in bundled_corpus_files():
        assert any(document in file.read_text() for document in held_out)


def test_every_stretch_of_the_order_holds_each_source_in_proportion() -> None:
    rng = np.random.default_rng()
    source_of = rng.integers(0, 3, 500)
    order = spread_order(source_of, seed=int(rng.integers(1000)))
    assert sorted(order) == list(range(500))
    for stretch in (order[:50], order[225:300], order[-50:]):
        for source in range(3):
            share = (source_of == source).mean() * len(stretch)
            assert abs((source_of[stretch] == source).sum() - share) <= 2


def test_a_text_file_is_one_document_unless_a_setting_cuts_it(tmp_path: Path) -> None:
    texts = [file.read_text() for file in bundled_corpus_files()]
    files = [str(file) for file in bundled_corpus_files()]
    made = prepare(PrepareConfig(input=files, output=str(tmp_path / "whole")))
    assert sorted(documents(str(tmp_path / "whole"))) == sorted(texts)
    assert (made.files_cut, made.document_chars) == (0, None)
    made = prepare(PrepareConfig(input=files, output=str(tmp_path / "cut"), document_chars=200_000))
    assert (made.files_cut, made.documents_cut, made.documents) == (1, 2, 4)


def test_the_bundled_corpus_is_cut_into_documents_by_default(tmp_path: Path) -> None:
    for name, settings in {"default": {}, "explicit": {"document_chars": 10_000}}.items():
        prepare(PrepareConfig(input="bundled", output=str(tmp_path / name), **settings))
    assert (tmp_path / "default.bin").read_bytes() == (tmp_path / "explicit.bin").read_bytes()
    assert len(documents(str(tmp_path / "default"))) > 50


def test_files_without_text_are_skipped_and_listed(tmp_path: Path) -> None:
    contents = {"a.jsonl": b'{"text": "first"}\n', "b.jsonl": b"", "c.txt": b" \n", "d.jsonl": b'{"text": " "}\n'}
    contents |= {"e.txt.gz": gzip.compress(b""), "f.txt": b"last"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for tokenizer in ("bytes", "bpe:258"):
        names = [str(tmp_path / name) for name in contents]
        made = prepare(PrepareConfig(names, str(tmp_path / "out"), tokenizer, overwrite=True))
        assert [Path(name).name for name in made.files_without_text] == ["b.jsonl", "c.txt", "d.jsonl", "e.txt.gz"]
        assert sorted(documents(str(tmp_path / "out"))) == ["first", "last"]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_input_without_any_text_is_rejected(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.txt").write_text(" \n\n ")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n')
    files = [str(tmp_path / name) for name in ("a.txt", "b.jsonl")]
    with pytest.raises(ConfigError, match=r"a\.txt: holds no text"):
        prepare(PrepareConfig(files[0], str(tmp_path / "out"), tokenizer))
    with pytest.raises(ConfigError, match=r"none of 2 files holds text"):
        prepare(PrepareConfig(files, str(tmp_path / "out"), tokenizer))


def test_rows_left_out_and_surrogates_replaced_are_counted(tmp_path: Path) -> None:
    rows = ['{"text": ""}', '{"text": "a\\ud800b\\udc00"}', "", '{"text": "\\ud83d\\ude00"}', '{"text": " \\n"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    made = prepare(PrepareConfig(str(tmp_path / "a.jsonl"), str(tmp_path / "out")))
    assert (made.blank_rows, made.replaced_surrogates) == (2, 2)
    assert sorted(documents(str(tmp_path / "out"))) == ["a\ufffdb\ufffd", "\U0001f600"]


def test_a_surrogate_written_as_bytes_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\xed\xa0\x80b"}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl: line 1 is not UTF-8"):
        prepare(PrepareConfig(str(tmp_path / "a.jsonl"), str(tmp_path / "out")))


def test_a_text_too_small_for_the_requested_bpe_is_rejected_with_the_size_it_yields(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words\n" * 20)
    settings = PrepareConfig(str(tmp_path / "a.txt"), str(tmp_path / "out"), "bpe:32768")
    with pytest.raises(ConfigError, match=r"^tokenizer=bpe:32768: the text yields only (\d+) ids") as error:
        prepare(settings)
    size = int(re.findall(r"Set bpe:(\d+)", error.value.remedy)[0])
    assert prepare(replace(settings, tokenizer=f"bpe:{size}")).vocab_size == size


def test_a_document_too_long_for_an_index_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s2train.preparation.tokenizing._MAX_TOKENS", 20)
    (tmp_path / "a.txt").write_text("long text\n" * 2)
    with pytest.raises(ConfigError, match=r"document 1 has 20 tokens, more than an index allows.*document_chars"):
        prepare(PrepareConfig(str(tmp_path / "a.txt"), str(tmp_path / "out")))


def test_the_same_settings_give_the_same_bytes_and_another_seed_another_order(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare(PrepareConfig(input="bundled", output=str(tmp_path / name), seed=seed))
    a, b, c = ((tmp_path / f"{name}.bin").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_an_output_with_a_file_suffix_is_rejected(tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        with pytest.raises(ConfigError, match=rf"prefix.*Set output={tmp_path}/out\.v2$"):
            prepare(PrepareConfig(input="bundled", output=f"{tmp_path}/out.v2{suffix}"))


def test_existing_output_is_kept_without_overwrite(tmp_path: Path) -> None:
    text, output = tmp_path / "a.txt", tmp_path / "out"
    text.write_text("old")
    prepare(PrepareConfig(input=str(text), output=str(output)))
    text.write_text("new text")
    before = (tmp_path / "out.bin").read_bytes()
    with pytest.raises(ConfigError, match=r"output=.*already exists: .*overwrite=true"):
        prepare(PrepareConfig(input=str(text), output=str(output)))
    assert (tmp_path / "out.bin").read_bytes() == before
    prepare(PrepareConfig(input=str(text), output=str(output), overwrite=True))
    assert documents(str(output)) == ["new text"]


def test_a_failed_run_leaves_the_old_output_and_nothing_incomplete(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("good")
    bad.write_bytes(b"\xff")
    prepare(PrepareConfig(input=str(good), output=str(tmp_path / "out")))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"bad\.txt"):
        prepare(PrepareConfig(input=[str(good), str(bad)], output=str(tmp_path / "out"), overwrite=True))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"input": "missing.txt"}, r"input=missing\.txt"),
        ({"input": "folder"}, r"input=folder: is a folder\. Name its files, such as folder/\*\.txt"),
        ({"input": "empty.txt"}, r"input=empty\.txt: holds no text"),
        ({"input": []}, "input="),
        ({"input": 3}, "input=3"),
        ({"tokenizer": "bpe:many"}, "tokenizer=bpe:many"),
        ({"tokenizer": "bpe:100"}, "tokenizer=bpe:100"),
        ({"tokenizer": "bpe:1000000000"}, "tokenizer=bpe:1000000000"),
        ({"tokenizer": "none.json"}, r"^tokenizer=none\.json"),
        ({"document_chars": 0}, "document_chars=0"),
        ({"input": "rows.jsonl", "document_chars": 5}, "document_chars=5: cuts text files, and input names none"),
        ({"input": "needles", "document_chars": 5}, "document_chars=5: cuts text files, and input names none"),
        ({"workers": 0}, "workers=0"),
        ({"input": "none*.txt"}, r"input=none\*\.txt: no file"),
        ({"seed": -1}, "seed=-1: is out of range"),
        ({"output": ""}, "output="),
        ({"output": "out/"}, "output=out/: names no file"),
    ],
)
def test_a_setting_that_cannot_work_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"text": "a row"}\n')
    with pytest.raises(ConfigError, match=named):
        prepare(PrepareConfig(**({"input": "bundled", "output": "out/data"} | settings)))  # type: ignore[arg-type]
    assert not list(tmp_path.glob("out/*"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Function that runs the script in `tmp_path`, inside this process."""

    def run(*arguments: str) -> None:
        script = Path(__file__).parents[2] / "launch" / "prepare_data.py"
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        monkeypatch.syspath_prepend(script.parent)
        runpy.run_path(str(script), run_name="__main__")

    return run


def test_the_command_writes_only_the_dataset(
    command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "hello"}))
    command("input=[a.jsonl]", "output=d/mine")
    assert "6 tokens" in capsys.readouterr().out
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert made == {"a.jsonl", "d/mine.bin", "d/mine.idx", "d/mine.json"}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["input=b.txt", "output=d/mine"], r"error: input=b\.txt: no such file\..*"),
        (["input=b.txt"], r"error: output=\(not set\): it has no value. Set output=…: prefix of the .*"),
    ],
)
def test_the_command_rejects_bad_settings_in_one_line(
    command: Callable[..., None], arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        command(*arguments)
    assert stop.value.code != 0
    assert re.fullmatch(problem, capsys.readouterr().err.strip())


def test_the_command_prints_a_summary(
    command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["a" * 9, "b" * 19, "c\ud800", ""]
    (tmp_path / "a.json").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "b.txt").write_text("one\n\ntwo\n\nthree\n")
    (tmp_path / "c.txt").touch()
    command("input=[a.json,b.txt,c.txt]", "output=mine", "document_chars=5", "tokenizer=bytes")
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("mine: 5 documents, 53 tokens of 257 ids (bytes), unigram entropy ")
    assert lines == [
        "tokens per document: 5 shortest, 6 (10 %), 10 median, 16 (90 %), 20 longest",
        "end of document: id 256",
        "read as: JSON lines (1 file), text (2 files)",
        "cut: 1 text file into 2 documents of 5 characters or more (document_chars), shuffled",
        "left out: 1 row without text",
        "replaced by U+FFFD: 1 lone surrogate",
        "skipped: c.txt: no text",
    ]


def test_the_command_warns_that_no_document_is_held_out(
    command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("some words\n" * 3000)
    command("input=a.txt", "output=mine", "tokenizer=bpe:264", "'end_token=\"<eos>\"'".strip("'"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mine: 1 document, ")
    assert "end of document: <eos>, id 0" in lines
    assert "cut: nothing; each text file is one document (set document_chars to cut them)" in lines
    note = r"note: without data\.valid_path, data\.split=90,10,0 would leave the held-out part without a doc.*10000"
    assert re.match(note, lines[-1])


def test_reading_for_a_tokenizer_shows_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("s2train.preparation.prepare.Meter", partial(Meter, every=0))
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("".join(f"{number} words\n" for number in range(400)))
    names = [str(tmp_path / f"{name}.txt") for name in "ab"]
    prepare(PrepareConfig(input=names, output=str(tmp_path / "out"), tokenizer="bpe:300"))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("reading for the tokenizer: ")]
    assert "50%" in lines[0]
    assert "100%" in lines[-1]
