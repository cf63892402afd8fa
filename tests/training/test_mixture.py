"""A run on a mixture of a corpus and needles, from its texts to the samples that its steps took."""

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from s2train.data.bundled import bundled_corpus_files
from s2train.data.tokenizers import ByteTokenizer
from tests.program import ROOT, SMALL, run

pytestmark = [pytest.mark.slow]

TOKENIZER = ByteTokenizer()


def text_of(ids: torch.Tensor) -> str:
    """Text with the end of a document as U+0100."""
    return "".join(map(chr, ids.tolist()))


def prepared(output: Path, *settings: str) -> str:
    """All documents, one after the other, of a dataset that launch/prepare_data.py makes."""
    done = run("prepare_data.py", f"output={output}", *settings, processes=0)
    assert done.status == 0, done.err
    dataset = IndexedDataset(str(output))
    return "".join(text_of(dataset[i]) for i in range(len(dataset)))


def test_a_run_on_a_corpus_and_needles_trains_on_samples_of_both_in_their_shares(tmp_path: Path) -> None:
    names = {"corpus": [f"input={bundled_corpus_files()[0]}", "document_chars=10000"]}
    names["needles"] = ["input=needles", "needles.documents=300", "needles.length=200"]
    texts = {name: prepared(tmp_path / name, *settings) for name, settings in names.items()}
    path = f"data.path=[0.9,{tmp_path / 'corpus'},0.1,{tmp_path / 'needles'}]"
    settings = [*SMALL, f"run_dir={tmp_path / 'run'}", path, f"data.cache={tmp_path / 'cache'}", "train.steps=5"]
    with mock.patch.dict(os.environ, S2TRAIN_TEST_DRAWN=str(tmp_path / "drawn.pt")):
        done = run(str(ROOT / "tests" / "training" / "drawn_program.py"), *settings)
    assert done.status == 0, done.err
    samples = [text_of(sample) for sample in torch.load(tmp_path / "drawn.pt")]
    end = chr(TOKENIZER.eod)
    drawn = {
        name: sum(all(piece in text for piece in sample.split(end)) for sample in samples)
        for name, text in texts.items()
    }
    assert len(samples) == 40
    assert drawn == {"corpus": 36, "needles": 4}
