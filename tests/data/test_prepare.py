import hashlib
import json
import re
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from s2train.config import PrepareConfig
from s2train.data.bundled import bundled_corpus_files
from s2train.data.indexed import read_document_lengths, read_metadata
from s2train.data.meter import Meter
from s2train.data.prepare import prepare, spread_order
from s2train.data.tokenizers import load_tokenizer
from s2train.errors import ConfigError


def documents(prefix: str) -> list[str]:
    metadata = read_metadata(prefix)
    assert metadata is not None
    tokenizer = load_tokenizer(metadata.tokenizer)
    dataset = IndexedDataset(prefix)
    assert all(dataset[i][-1] == tokenizer.eod for i in range(len(dataset)))
    return [tokenizer.decode(dataset[i].tolist()) for i in range(len(dataset))]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:500"])
def test_tokens_decode_to_the_texts_that_went_in(tmp_path: Path, tokenizer: str) -> None:
    output = str(tmp_path / "sub" / "out")
    prepare(PrepareConfig(input="bundled", output=output, tokenizer=tokenizer, document_chars=5000))
    cut = documents(output)
    for file in bundled_corpus_files():
        text = file.read_text()
        rest = sorted((document for document in cut if document in text), key=text.index)
        assert "".join(rest) == text
    assert sum(map(len, cut)) == sum(len(file.read_text()) for file in bundled_corpus_files())


def test_the_sidecar_tells_how_the_data_were_made(corpus: str) -> None:
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


def test_the_same_settings_give_the_same_bytes_and_another_seed_another_order(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare(PrepareConfig(input="bundled", output=str(tmp_path / name), seed=seed))
    a, b, c = ((tmp_path / f"{name}.bin").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_an_output_with_a_suffix_of_the_files_is_refused(tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        with pytest.raises(ConfigError, match=rf"prefix.*Set output={tmp_path}/out\.v2$"):
            prepare(PrepareConfig(input="bundled", output=f"{tmp_path}/out.v2{suffix}"))


def test_existing_output_is_kept_unless_told_to_overwrite(tmp_path: Path) -> None:
    text, output = tmp_path / "a.txt", tmp_path / "out"
    text.write_text("old")
    prepare(PrepareConfig(input=str(text), output=str(output)))
    text.write_text("new text")
    before = (tmp_path / "out.bin").read_bytes()
    with pytest.raises(ConfigError, match=r"output=.*exists.*overwrite=true"):
        prepare(PrepareConfig(input=str(text), output=str(output)))
    assert (tmp_path / "out.bin").read_bytes() == before
    prepare(PrepareConfig(input=str(text), output=str(output), overwrite=True))
    assert documents(str(output)) == ["new text"]


def test_a_run_that_fails_leaves_the_old_output_and_nothing_half_written(tmp_path: Path) -> None:
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
        ({"input": "empty.txt"}, r"input=empty\.txt: is empty"),
        ({"input": []}, "input="),
        ({"input": 3}, "input=3"),
        ({"tokenizer": "bpe:many"}, "tokenizer=bpe:many"),
        ({"tokenizer": "bpe:100"}, "tokenizer=bpe:100"),
        ({"tokenizer": "none.json"}, r"^tokenizer=none\.json"),
        ({"document_chars": 0}, "document_chars=0"),
        ({"workers": 0}, "workers=0"),
        ({"input": "none*.txt"}, r"input=none\*\.txt: no file"),
        ({"output": ""}, "output="),
    ],
)
def test_a_setting_that_cannot_work_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ConfigError, match=named):
        prepare(PrepareConfig(**({"input": "bundled", "output": "out/data"} | settings)))  # type: ignore[arg-type]
    assert not list(tmp_path.glob("out/*"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Runs the script in `tmp_path`, within this process."""

    def run(*arguments: str) -> None:
        script = Path(__file__).parents[2] / "launch" / "prepare_data.py"
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")

    return run


def test_the_command_prepares_files_and_leaves_nothing_else(
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
        (["input=b.txt"], r"error: output=missing: it has no value. Set output=…\."),
    ],
)
def test_the_command_refuses_what_cannot_work_in_one_line(
    command: Callable[..., None], arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        command(*arguments)
    assert stop.value.code != 0
    assert re.fullmatch(problem, capsys.readouterr().err.strip())


def test_reading_for_a_tokenizer_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("s2train.data.prepare.Meter", partial(Meter, every=0))
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("some words\n" * 200)
    names = [str(tmp_path / f"{name}.txt") for name in "ab"]
    prepare(PrepareConfig(input=names, output=str(tmp_path / "out"), tokenizer="bpe:300"))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("reading for the tokenizer: ")]
    assert "50%" in lines[0]
    assert "100%" in lines[-1]
