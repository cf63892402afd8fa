"""A run takes the samples that its data, mixture and length determine, also after a resume."""

import json
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from s2train.data.bundled import bundled_corpus_files
from s2train.data.tokenizers import ByteTokenizer
from tests.data_fixtures import write_dataset
from tests.program import ROOT, SMALL, metrics, run

pytestmark = [pytest.mark.slow]

# One layer: its samples are those of any model.
SHALLOW = [*SMALL, "model.num_layers=1", "layout.layers=D"]
DRAWN_PROGRAM = str(ROOT / "tests" / "training" / "drawn_program.py")
TOKENIZER = ByteTokenizer()


def text_of(ids: torch.Tensor) -> str:
    """Decode ids to text; the end of a document becomes U+0100."""
    return "".join(map(chr, ids.tolist()))


def prepared(output: Path, *settings: str) -> str:
    """All documents of a dataset from launch/prepare_data.py, concatenated."""
    run("prepare_data.py", f"output={output}", *settings, processes=0).succeeded()
    dataset = IndexedDataset(str(output))
    return "".join(text_of(dataset[i]) for i in range(len(dataset)))


def test_a_run_on_a_mixture_trains_on_samples_in_their_shares(tmp_path: Path) -> None:
    names = {"corpus": [f"input={bundled_corpus_files()[0]}", "document_chars=10000"]}
    names["needles"] = ["input=needles", "needles.documents=300", "needles.length=200"]
    texts = {name: prepared(tmp_path / name, *settings) for name, settings in names.items()}
    path = f"data.path=[0.9,{tmp_path / 'corpus'},0.1,{tmp_path / 'needles'}]"
    settings = [*SHALLOW, f"run_dir={tmp_path / 'run'}", path, f"data.cache={tmp_path / 'cache'}", "train.steps=5"]
    with mock.patch.dict(os.environ, S2TRAIN_TEST_DRAWN=str(tmp_path / "drawn.pt")):
        done = run(DRAWN_PROGRAM, *settings)
    assert done.status == 0, done.err
    samples = [text_of(sample) for sample in torch.load(tmp_path / "drawn.pt")]
    end = chr(TOKENIZER.eod)
    drawn = {
        name: sum(all(piece in text for piece in sample.split(end)) for sample in samples)
        for name, text in texts.items()
    }
    assert len(samples) == 40
    assert drawn == {"corpus": 36, "needles": 4}


def drawn(folder: Path, run_dir: str, *settings: str) -> torch.Tensor:
    """Samples that a run takes from data of 28 samples per epoch, all different."""
    if not (folder / "data.idx").exists():
        write_dataset(folder / "data", [f"document {number:04d}\n" * 8 for number in range(36)])
    given = [f"run_dir={folder / run_dir}", f"data.path={folder / 'data'}", f"data.cache={folder / 'cache'}"]
    with mock.patch.dict(os.environ, S2TRAIN_TEST_DRAWN=str(folder / "drawn.pt")):
        done = run(DRAWN_PROGRAM, *SHALLOW, *given, "optim.decay_steps=6", *settings, processes=0)
    assert done.status == 0, done.err
    samples: torch.Tensor = torch.load(folder / "drawn.pt")
    return samples


def test_a_longer_run_in_smaller_batches_takes_the_samples_of_an_uninterrupted_run(
    tmp_path: Path,
) -> None:
    first = drawn(tmp_path, "a", "train.steps=3")  # 24 samples: less than an epoch
    smaller = ["train.global_batch_size=4", "checkpoint.allow_changes=train.global_batch_size"]
    longer = drawn(tmp_path, "a", "train.steps=13", *smaller)
    again = drawn(tmp_path, "a", "train.steps=14", *smaller)
    whole = drawn(tmp_path, "b", "train.steps=9", "data.num_samples=24")
    assert [len(samples) for samples in (first, longer, again, whole)] == [24, 40, 4, 72]
    assert torch.equal(torch.cat([first, longer, again]), whole[:68])
    assert metrics(tmp_path / "a")[-1]["step"] == 14
    records = map(json.loads, (tmp_path / "a" / "metrics.jsonl").read_text().splitlines())
    epochs = [epoch for record in records for epoch in record.get("epochs", {}).values()]
    assert [epoch / epochs[0] for epoch in epochs] == pytest.approx([1, 64 / 24, 68 / 24])


def test_a_shortened_run_takes_the_first_samples_of_the_longer_one(tmp_path: Path) -> None:
    whole = drawn(tmp_path, "a", "train.steps=9")  # two epochs and more, shuffled together
    stopped = drawn(tmp_path, "b", "train.steps=9", "train.exit_step=3")
    shorter = drawn(tmp_path, "b", "train.steps=5")
    assert torch.equal(torch.cat([stopped, shorter]), whole[:40])
