"""Interrupted preparation resumes or starts over, and never leaves incomplete output."""

import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from s2train.data.bundled import bundled_corpus_files
from s2train.data.indexed import read_document_lengths
from s2train.data.tokenizers import train_bpe
from s2train.errors import ConfigError, TrainingError
from s2train.preparation import resumable_writer, sources, tokenizing
from s2train.preparation.config import PrepareConfig
from s2train.preparation.prepare import prepare

PIECE = 2000


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files of text, of some twenty pieces each."""
    (corpus, *_) = bundled_corpus_files()
    paths = [tmp_path / name for name in ("a.txt", "b.txt")]
    for number, path in enumerate(paths):
        path.write_bytes(corpus.read_bytes()[number * 50_000 :][:50_000].decode(errors="ignore").encode())
    return paths


@pytest.fixture
def work(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareConfig:
    """Settings for a preparation of some fifty pieces."""
    monkeypatch.setattr(sources, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(resumable_writer, "JOURNAL_SECONDS", 0.0)
    output = str(tmp_path / "out" / "mine")
    return PrepareConfig(input=[str(path) for path in files], output=output, document_chars=1000, workers=1)


def content(output: str) -> dict[str, bytes]:
    prefix = Path(output)
    if not prefix.parent.exists():
        return {}
    return {path.suffix: path.read_bytes() for path in prefix.parent.iterdir() if path.name.startswith(prefix.name)}


@pytest.fixture
def expected(work: PrepareConfig, tmp_path: Path) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    prepare(replace(work, output=str(tmp_path / "whole" / "mine")))
    return content(str(tmp_path / "whole" / "mine"))


def interrupt_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int, error: BaseException) -> None:
    """Make a method raise `error` after some calls."""
    true: Callable[..., Any] = getattr(owner, name)
    left = [calls]

    def method(*args: Any, **kwargs: Any) -> Any:
        if left[0] == 0:
            raise error
        left[0] -= 1
        return true(*args, **kwargs)

    monkeypatch.setattr(owner, name, method)


def test_interrupted_work_resumes_where_it_stopped(
    files: list[Path], work: PrepareConfig, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = random.randint(1, 35)
    with monkeypatch.context() as patch:
        interrupt_after(patch, resumable_writer.ResumableWriter, "add", done, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prepare(work)
    assert content(work.output) == {}
    encoded: list[object] = []
    true = tokenizing.encode
    monkeypatch.setattr(tokenizing, "encode", lambda *args: encoded.append(args) or true(*args))
    prepare(work)
    assert content(work.output) == expected
    lines = sum(
        1
        for number, path in enumerate(files)
        for _ in sources.read_pieces(sources.Source.of(path, 1000), number, "text")
    )
    assert len(encoded) == lines - done


@pytest.mark.parametrize("changed", [{"document_chars": 1001}, {"seed": 5}, {"tokenizer": "bpe:300"}])
def test_other_settings_start_over(
    work: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, resumable_writer.ResumableWriter, "add", 20, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prepare(work)
    other = replace(work, **changed)
    prepare(other)
    prepare(replace(other, output=str(tmp_path / "whole" / "mine")))
    found, whole = content(other.output), content(str(tmp_path / "whole" / "mine"))
    assert found[".bin"] == whole[".bin"]
    assert found[".idx"] == whole[".idx"]


@pytest.mark.parametrize("renames", range(4))
def test_an_interruption_between_the_renames_leaves_no_index_and_is_finished_next_time(
    work: PrepareConfig, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, Path, "replace", renames, KeyboardInterrupt())
        if renames < 3:
            with pytest.raises(KeyboardInterrupt):
                prepare(work)
            assert ".idx" not in content(work.output)
        else:
            prepare(work)
    if renames < 3:
        prepare(work)
    assert content(work.output) == expected
    assert {path.name for path in Path(work.output).parent.iterdir()} == {"mine.bin", "mine.idx", "mine.json"}


def test_a_full_disk_is_reported_in_one_line_and_keeps_the_progress(
    work: PrepareConfig, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, resumable_writer.ResumableWriter, "add", 20, OSError(28, "No space left on device"))
        with pytest.raises(TrainingError, match=r"No space left on device.*run the same command again to resume"):
            prepare(work)
    prepare(work)
    assert content(work.output) == expected


def test_two_processes_do_not_prepare_the_same_output(work: PrepareConfig) -> None:
    from filelock import FileLock

    folder = Path(work.output).parent / ".mine.partial"
    folder.mkdir(parents=True)
    with FileLock(folder / "lock"), pytest.raises(ConfigError, match=r"output=.*: another process is writing it. Wait"):
        prepare(work)


def _prepare_small_pieces(work: PrepareConfig) -> None:
    sources.PIECE_BYTES = PIECE
    resumable_writer.JOURNAL_SECONDS = 0.0
    prepare(work)


@pytest.mark.slow
def test_a_process_killed_at_any_moment_leaves_no_partial_index_and_the_same_files_in_the_end(
    work: PrepareConfig, expected: dict[str, bytes]
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["s2train.preparation.prepare"])
    started = time.monotonic()
    for _ in range(2):  # the first is slower, as it starts the server
        started = time.monotonic()
        child = context.Process(target=_prepare_small_pieces, args=(work,))
        child.start()
        child.join()
        assert child.exitcode == 0
        shutil.rmtree(Path(work.output).parent)
    usual = time.monotonic() - started
    for _ in range(3):
        for attempt in range(12):
            child = context.Process(target=_prepare_small_pieces, args=(work,))
            child.start()
            child.join(random.uniform(0, usual))
            child.kill()
            child.join()
            if ".idx" in content(work.output):  # then the other files are complete
                assert content(work.output) == expected, attempt
                read_document_lengths(work.output)
                break
        if not Path(work.output + ".idx").exists() or (Path(work.output).parent / ".mine.partial").exists():
            prepare(work)
        assert content(work.output) == expected
        shutil.rmtree(Path(work.output).parent)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A file large enough for two workers."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "number {number}, {"x" * 900}"}}\n' for number in range(10_000)))
    return path


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same_bytes(texts: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        prepare(PrepareConfig(input=str(texts), output=str(tmp_path / str(workers) / "mine"), workers=workers))
    assert content(str(tmp_path / "1" / "mine")) == content(str(tmp_path / "2" / "mine"))


@pytest.mark.slow
def test_a_bad_line_is_named_from_a_worker_too(texts: Path, tmp_path: Path) -> None:
    with texts.open("a") as file:
        file.write("{}\n")
    with pytest.raises(ConfigError, match=r"a\.jsonl: line 10001 has no \"text\".* Set text_key"):
        prepare(PrepareConfig(input=str(texts), output=str(tmp_path / "out" / "mine"), workers=2))


@pytest.mark.slow
def test_workers_exit_when_their_parent_is_killed(texts: Path, tmp_path: Path) -> None:
    texts.write_text(texts.read_text() * 5)
    train_bpe(["number 1, xx, xxxx"] * 9, 300, tmp_path / "bpe.json")
    output, tokenizer = str(tmp_path / "mine"), str(tmp_path / "bpe.json")
    code = (
        "if __name__ == '__main__':\n"  # workers import this file
        "    from s2train.preparation.config import PrepareConfig\n"
        "    from s2train.preparation.prepare import prepare\n"
        f"    prepare(PrepareConfig({str(texts)!r}, {output!r}, {tokenizer!r}, workers=2))\n"
    )
    (tmp_path / "program.py").write_text(code)
    parent = subprocess.Popen([sys.executable, tmp_path / "program.py"], stderr=subprocess.DEVNULL)
    tokens = tmp_path / ".mine.partial" / "tokens"
    while parent.poll() is None and not (tokens.exists() and tokens.stat().st_size):
        time.sleep(0.05)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
