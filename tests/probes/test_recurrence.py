import math

import pytest
import torch
from torch import Tensor

from s2train.data.tokenizers import ByteTokenizer
from s2train.probes.documents import Document
from s2train.probes.recurrence import Recurrence, by_distance, choose_sequences, measure
from tests.probes.source_text import source

BYTES = ByteTokenizer()


def documents() -> list[Document]:
    return [Document.of(source(seed, 60, 6), BYTES) for seed in (1, 2)]


def test_pairs_are_the_first_two_occurrences_in_a_sequence() -> None:
    passages = choose_sequences(documents(), 512, 4, seed=1)
    assert len(passages) == 4
    for passage in passages:
        text = BYTES.decode(passage.ids.tolist())
        for first, second in passage.pairs:
            name = text[slice(*first)]
            assert name == text[slice(*second)]
            assert text.index(name) == first[0]


def test_names_of_several_documents_are_not_rare() -> None:
    same = [Document.of(source(1, 60, 6), BYTES)] * 2
    assert choose_sequences(same, 512, 4, seed=1) == []


def test_losses_are_means_over_the_tokens_of_an_occurrence() -> None:
    [passage] = choose_sequences(documents(), 512, 1, seed=1)
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 512, 257, generator=rng)

    def model(tokens: Tensor) -> Tensor:
        assert tokens.tolist() == [passage.ids.tolist()]
        return logits

    found = measure(model, [passage], torch.device("cpu"))
    log_p = logits[0].double().log_softmax(-1)
    for (first, second), one in zip(passage.pairs, found, strict=True):
        expected = [-sum(log_p[t - 1, passage.ids[t]].item() for t in range(*span)) / 12 for span in (first, second)]
        assert [one.first_loss, one.second_loss] == pytest.approx(expected, rel=1e-5)
        assert one.distance == second[0] - first[0]


def test_ranges_of_distance_have_counts_means_and_intervals() -> None:
    found = [Recurrence(100, 5.0, 1.0), Recurrence(200, 7.0, 3.0), Recurrence(5000, 6.0, 2.0)]
    near, far = by_distance(found)
    assert (near["from"], near["to"], near["count"]) == (64, 256, 2)
    assert (near["second_loss"], near["first_loss"]) == (2.0, 6.0)
    half = 1.959963984540054 * math.sqrt(2) / math.sqrt(2)
    assert near["second_loss_interval"] == pytest.approx([2 - half, 2 + half])
    assert (far["from"], far["count"], far["second_loss_interval"]) == (4096, 1, None)
