"""Measures data preparation: `python -m s2train.preparation.throughput OUTPUT.json [--workers 1 8]`.

Prepares the bundled corpus, repeated to the given size, in each format, with each tokenizer and number of processes.
Times the whole preparation: reading, tokenizing, shuffling, writing and hashing. A BPE is trained beforehand on one
copy of the corpus.
"""

import argparse
import datetime
import gzip
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from s2train.command_line.program import run_command
from s2train.data.bundled import bundled_corpus_files
from s2train.data.tokenizers import train_bpe
from s2train.errors import ConfigError
from s2train.files import check_writable, write_json
from s2train.preparation.config import PrepareConfig
from s2train.preparation.cutting import split_documents
from s2train.preparation.prepare import prepare


def write_inputs(folder: Path, size: int) -> dict[str, Path]:
    """Write `size` bytes of text in each installed format."""
    texts = [text for file in bundled_corpus_files() for text in split_documents(file.open(encoding="utf-8"), 4000)]
    texts *= max(1, size // sum(len(text.encode()) for text in texts))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    made: dict[str, Callable[[Path], object]] = {
        "corpus.txt": lambda path: path.write_text("\n\n".join(texts), encoding="utf-8"),
        "corpus.jsonl": lambda path: path.write_bytes(lines),
        "corpus.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines, 1)),
        "corpus.jsonl.zst": lambda path: _write_zstandard(path, lines),
        "corpus.parquet": lambda path: _write_parquet(path, texts),
    }
    files = {}
    for name, write in made.items():
        try:
            write(folder / name)
        except ImportError:
            continue
        files[name.removeprefix("corpus")] = folder / name
    return files


def _write_zstandard(path: Path, content: bytes) -> None:
    import zstandard

    path.write_bytes(zstandard.compress(content))


def _write_parquet(path: Path, texts: list[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)


def measure(folder: Path, megabytes: int, vocabulary: int, workers: list[int]) -> list[dict[str, object]]:
    """Measure seconds and MB/s of text for each case.

    Cases are every format with bytes, and .jsonl with a BPE, each with every number of processes.
    """
    files = write_inputs(folder, megabytes * 10**6)
    bpe = folder / "tokenizer.json"
    train_bpe((file.read_text(encoding="utf-8") for file in bundled_corpus_files()), vocabulary, bpe)
    size = files[".txt"].stat().st_size
    cases = [(name, "bytes") for name in files] + [(".jsonl", str(bpe))]
    found: list[dict[str, object]] = []
    for name, tokenizer in cases:
        for count in workers:
            output = folder / f"out{len(found)}"
            started = time.perf_counter()
            chars = 10_000 if name.startswith(".txt") else None
            made = prepare(PrepareConfig(str(files[name]), str(output), tokenizer, document_chars=chars, workers=count))
            seconds = time.perf_counter() - started
            label = "bytes" if tokenizer == "bytes" else f"bpe of {made.vocab_size}"
            record = {"format": name, "tokenizer": label, "workers": count, "tokens": made.tokens}
            found.append(record | {"seconds": round(seconds, 2), "text_mb_per_s": round(size / 1e6 / seconds, 1)})
            print(found[-1], flush=True)
            output.with_suffix(".bin").unlink()
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--megabytes", type=int, default=200, help="megabytes of text")
    parser.add_argument("--vocabulary", type=int, default=32768, help="ids of the BPE")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    given = parser.parse_args()
    if given.output.exists():
        raise ConfigError("output", given.output, "it exists", "Set another file")
    check_writable("output", given.output.parent)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), given.megabytes, given.vocabulary, given.workers)
    about = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "s2train.preparation.throughput", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} CPU cores, {platform.processor() or platform.machine()}",
        "python": platform.python_version(),
        "load_average_before_the_end": os.getloadavg()[1],
        "results": results,
    }
    write_json(given.output, about)


if __name__ == "__main__":
    run_command(main)
