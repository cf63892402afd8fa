import json
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from s2train.data.tokenizers import FileTokenizer, train_bpe
from s2train.preparation import tokenizing
from s2train.preparation.sources import Piece
from s2train.preparation.tokenizing import Encoding, encode

PARALLELISM = "TOKENIZERS_PARALLELISM"
TEXT = "".join(f"static int counter_{number % 977} = {number};\n" for number in range(40_000))


@pytest.fixture
def encoding(tmp_path: Path) -> Encoding:
    path = tmp_path / "tokenizer.json"
    train_bpe([TEXT[:100_000]], 512, path)
    return Encoding(str(path), "uint16", "text")


def ids(encoding: Encoding) -> npt.NDArray[np.integer]:
    line = json.dumps({"text": TEXT}).encode()
    return encode(Piece(0, line, "line", 1, len(line)), encoding).tokens


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What the tokenizers library reads, call by call."""
    found: list[str | None] = []
    plain = FileTokenizer.encode_many

    def spy(self: FileTokenizer, texts: list[str]) -> list[npt.NDArray[np.integer]]:
        found.append(os.environ.get(PARALLELISM))
        return plain(self, texts)

    monkeypatch.setattr(FileTokenizer, "encode_many", spy)
    return found


@pytest.mark.parametrize(("length", "threads"), [(len(TEXT), "true"), (len(TEXT) + 1, "false")])
def test_a_worker_uses_threads_for_long_documents_only(
    length: int, threads: str, encoding: Encoding, seen: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PARALLELISM, "false")
    monkeypatch.setattr(tokenizing, "THREADED_CHARS", length)
    ids(encoding)
    assert seen == [threads]
    assert os.environ[PARALLELISM] == "false"


def test_ids_do_not_depend_on_threads(encoding: Encoding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PARALLELISM, "false")
    alone = ids(encoding)
    monkeypatch.setattr(tokenizing, "THREADED_CHARS", 1)
    assert np.array_equal(ids(encoding), alone)
    assert len(alone) > 100_000
