"""Training documents train needle retrieval and never contain what evaluation asks for."""

import re
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from s2train.data.indexed import read_metadata
from s2train.data.tokenizers import ByteTokenizer, load_tokenizer, train_bpe
from s2train.errors import ConfigError
from s2train.needles import recall
from s2train.needles.config import NeedleDocumentsConfig
from s2train.needles.documents import RECALLS, needle_documents
from s2train.needles.recall import Pieces, RecallDocuments, order_facts, recall_facts
from s2train.needles.samples import TaskSampler
from s2train.needles.tasks import TASKS, find_task
from s2train.needles.words import NOISE, Split, split_of
from s2train.preparation.config import PrepareConfig
from s2train.preparation.prepare import prepare

BYTES = ByteTokenizer()
ALL_FACTS = recall.POOL
KEY, VALUE = r"[a-z]+-[a-z]+(?:-\d{3})?", r"\b\d{7}\b"
LETTERS = r"\b[A-Z]{3}\b"  # names of variable tracking
NUMBER = re.compile(r"-\d{3}$")  # the number in a line's key


@pytest.fixture(autouse=True)
def few_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer facts to draw from: encoding all takes longer than most tests here."""
    monkeypatch.setattr(recall, "POOL", 1 << 11)


def texts(cfg: NeedleDocumentsConfig, seed: int) -> list[str]:
    return [BYTES.decode(document.tolist()) for document in needle_documents(cfg, BYTES, seed)]


def secrets(text: str) -> set[str]:
    """Keys, values and names in a text, except one that its beginning may truncate."""
    return {found for kind in (KEY, VALUE, LETTERS) for found in re.findall(rf"(?<= ){kind}", text)}


def mentions(text: str) -> set[tuple[str, str]]:
    return set(re.findall(rf"({KEY}) is ({VALUE})\.", text))


@cache
def evaluation_secrets(task: str, split: Split, seed: int) -> set[str]:
    sampler = TaskSampler(BYTES, NOISE, find_task(task, {}))
    rng = np.random.default_rng(seed)
    samples = [sampler.sample(rng, 700, float(rng.random()), split) for _ in range(60)]
    return {found for s in samples for found in secrets(BYTES.decode([*s.prompt.tolist(), *s.answer.tolist()]))}


def splits(secrets: set[str]) -> set[Split]:
    """Splits of secrets; the words before the number determine the split of a line's key."""
    return {split_of(NUMBER.sub("", secret)) for secret in secrets}


@pytest.fixture(scope="module")
def seed() -> int:
    return int(np.random.default_rng().integers(1 << 30))


@pytest.mark.parametrize(
    ("task", "haystack"),
    [*((task, "noise") for task in (*RECALLS, *TASKS)), ("recall", "bundled"), ("multi", "bundled")],
)
def test_no_document_contains_a_key_value_or_name_of_an_evaluation(task: str, haystack: str, seed: int) -> None:
    trained = texts(NeedleDocumentsConfig(task, haystack=haystack, documents=80, length=701), seed)
    assert len(set().union(*map(secrets, trained))) > 100
    for other in TASKS:
        asked = {NUMBER.sub("", secret) for secret in evaluation_secrets(other, "eval", seed)}
        assert splits(asked) == {"eval"}
        assert not re.findall(rf"\b(?:{'|'.join(asked)})\b", "\n".join(trained))


@pytest.mark.parametrize("task", [*RECALLS, *TASKS])
def test_all_keys_values_and_names_of_documents_are_of_the_training_split(task: str) -> None:
    trained = set().union(*map(secrets, texts(NeedleDocumentsConfig(task, documents=80, length=701), seed=3)))
    assert splits(trained) == {"train"}


def test_the_search_for_secrets_finds_what_a_leak_would_bring() -> None:
    leaked = evaluation_secrets("key_value", "train", 3)
    assert leaked & {key.strip()[:-1] for key, _ in recall_facts("recall_lines", 3)} or len(leaked) > 100
    assert splits(leaked) == {"train"}


@pytest.mark.parametrize("task", [*RECALLS, "single", "variable_tracking"])
@pytest.mark.parametrize("length", [401, 1024])
def test_each_document_has_the_requested_length_and_one_end(task: str, length: int) -> None:
    cfg = NeedleDocumentsConfig(task, documents=70, length=length)
    documents = list(needle_documents(cfg, BYTES, seed=5))
    assert [len(document) for document in documents] == [length] * 70
    assert all(np.flatnonzero(document == BYTES.eod).tolist() == [length - 1] for document in documents)


@pytest.mark.parametrize("asks_last", [0.0, 1.0])
def test_some_long_documents_begin_with_a_fact(asks_last: float) -> None:
    """Needles at depth 0 need them, and a long document of few facts would rarely begin with one by chance."""
    cfg = NeedleDocumentsConfig("recall", documents=200, length=4000, share=(0.05, 0.06), questions_last=asks_last)
    begins = [text.startswith(" The magic number of") for text in texts(cfg, seed=5)]
    assert 0.2 < np.mean(begins) < 0.9


def test_documents_with_questions_last_have_facts_with_little_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "POOL", ALL_FACTS)
    cfg = NeedleDocumentsConfig("recall", documents=100, length=8000, share=(0.1, 0.2), questions_last=1.0)
    positions = [text.find(f"{key} is {value}") for text in texts(cfg, seed=6) for key, value in mentions(text)]
    assert 0.1 < np.mean(np.array(positions) < 80) < 0.4  # one in a hundred if evenly placed


def test_values_are_drawn_evenly_over_their_first_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a tokenizer with only some pairs of digits makes some first tokens ten times rarer."""
    monkeypatch.setattr(recall, "POOL", ALL_FACTS)
    train_bpe([f" {value}" for value in range(1_000_000, 1_030_000, 7)] * 2, 300, tmp_path / "bpe.json")
    tokenizer = load_tokenizer(str(tmp_path / "bpe.json"))
    counts: Counter[int] = Counter()
    for document in needle_documents(NeedleDocumentsConfig("recall", documents=150, length=900), tokenizer, 3):
        found = mentions(tokenizer.decode(document.tolist()))
        counts.update(tokenizer.encode(f" {value}.")[0] for _, value in found)
    pool = Counter(tokenizer.encode(tail)[0] for _, tail in recall_facts("recall", 3))
    often = [token for token, count in pool.items() if count > 50]
    assert max(pool[token] for token in often) > 3 * min(pool[token] for token in often)
    assert max(counts[token] for token in often) < 2 * min(counts[token] for token in often)


def test_values_with_a_rare_first_token_are_not_drawn_often_enough_to_be_memorized(tmp_path: Path) -> None:
    values = [f" {value}." for value in range(1_000_000, 1_030_000, 7)]
    train_bpe(values, 300, tmp_path / "bpe.json")
    tokenizer = load_tokenizer(str(tmp_path / "bpe.json"))
    facts = [(f" number {i} is", value) for i, value in enumerate(values)] + [(" the other is", " xyzzy.")]
    documents = RecallDocuments(NeedleDocumentsConfig("recall", length=2000), tokenizer, NOISE, facts)
    rng = np.random.default_rng(4)
    found = sum(tokenizer.decode(documents.document(rng).tolist()).count(" xyzzy") for _ in range(40))
    assert found < 40


@pytest.mark.parametrize("task", RECALLS)
def test_the_smallest_documents_can_have_their_questions_last(task: str) -> None:
    with pytest.raises(ConfigError) as error:
        next(needle_documents(NeedleDocumentsConfig(task, length=10), BYTES, 1))
    least = int(re.findall(r"up to (\d+) tokens", error.value.problem)[0])
    documents = list(
        needle_documents(NeedleDocumentsConfig(task, documents=300, length=least, questions_last=1.0), BYTES, 1)
    )
    assert [len(document) for document in documents] == [least] * 300


@pytest.mark.parametrize("task", RECALLS)
def test_a_key_has_one_value_in_a_document_and_is_repeated(task: str) -> None:
    pattern = rf"({KEY})(?: is|:) ({VALUE})\."
    for text in texts(NeedleDocumentsConfig(task, documents=50, length=800), seed=11):
        found = re.findall(pattern, text)
        assert len(found) >= 2
        assert len(dict(found)) == len(set(found)) < len(found)
        assert found[-1] in found[:-1]
        assert text.endswith(f"{found[-1][1]}.")


def test_a_recall_has_the_requested_numbers_of_facts_and_sentences() -> None:
    cfg = NeedleDocumentsConfig(documents=30, length=2048, share=[0.5, 0.5], facts=[7, 7])
    for text in texts(cfg, seed=2):
        sentences = re.findall(rf"The magic number of {KEY} is {VALUE}\.", text)
        assert len(set(sentences)) == 7
        assert 0.35 < sum(map(len, sentences)) / 2048 < 0.51
        assert "There and back again." in text


def test_facts_have_the_tokens_of_the_evaluation(tmp_path: Path) -> None:
    prefix = tmp_path / "small"
    needles = NeedleDocumentsConfig(documents=20, length=512, share=[0.9, 1.0], facts=[3, 3])
    prepare(PrepareConfig(input="needles", output=str(prefix), tokenizer="bpe:700", needles=needles))
    tokenizer = load_tokenizer(f"{prefix}-tokenizer.json")
    dataset = IndexedDataset(str(prefix))
    document = dataset[0].tolist()
    key, value = re.findall(rf"The magic number of ({KEY}) is ({VALUE})", tokenizer.decode(document))[-1]
    fact = [*tokenizer.encode(f" The magic number of {key} is"), *tokenizer.encode(f" {value}.")]
    assert document[-1 - len(fact) : -1] == fact


def test_documents_depend_on_the_seed_and_not_on_the_number_of_workers() -> None:
    cfg = NeedleDocumentsConfig(documents=150, length=256)
    alone = np.stack(list(needle_documents(cfg, BYTES, seed=1)))
    together = np.stack(list(needle_documents(replace(cfg, workers=2), BYTES, seed=1)))
    assert np.array_equal(alone, together)
    assert not np.array_equal(alone, np.stack(list(needle_documents(cfg, BYTES, seed=2))))


@pytest.mark.slow
def test_a_worker_that_rejects_a_setting_ends_the_work_with_that_error() -> None:
    cfg = NeedleDocumentsConfig(task="single", documents=150, length=50, workers=2)
    with pytest.raises(ConfigError, match=r"needles\.length=50: .* \d+ tokens.* end of document takes one.*or more"):
        list(needle_documents(cfg, BYTES, seed=1))


def test_facts_are_numbered_by_first_mention_and_the_last_sentence_repeats_one() -> None:
    rng = np.random.default_rng()
    for _ in range(200):
        sentences = int(rng.integers(2, 40))
        facts = int(rng.integers(1, sentences // 2 + 1))
        order = order_facts(rng, sentences, facts)
        firsts = [order.tolist().index(fact) for fact in range(facts)]
        assert firsts == sorted(firsts)
        assert set(order) == set(range(facts))
        assert firsts[-1] < sentences - 1


def test_questions_at_the_end_cover_every_distance_and_mostly_long_ones() -> None:
    # Enough documents that both bounds are five deviations from the expected 0.037 ± 0.004 and 0.40 ± 0.02.
    cfg = NeedleDocumentsConfig(documents=320, length=8192, share=[0.05, 0.1], questions_last=1.0)
    distances = []
    for document in needle_documents(cfg, BYTES, seed=int(np.random.default_rng().integers(1 << 30))):
        text = BYTES.decode(document.tolist())
        mentioned: dict[str, list[int]] = {}
        for found in re.finditer(rf"number of ({KEY}) is {VALUE}\.", text):
            mentioned.setdefault(found[1], []).append(found.start())
        assert {len(places) for places in mentioned.values()} == {2}
        assert max(first for first, _ in mentioned.values()) < min(second for _, second in mentioned.values())
        distances += [(second - first) / cfg.length for first, second in mentioned.values()]
    counts, _ = np.histogram(distances, 10, (0, 1))
    assert sum(counts) == len(distances)
    assert counts.min() > 0.015 * len(distances)
    assert counts[-1] > 0.3 * len(distances)


def test_pieces_are_joined_in_the_given_order() -> None:
    pieces = Pieces.of([[1, 2], [3], [4, 5, 6]])
    assert pieces.joined(np.array([2, 0, 2, 1])).tolist() == [4, 5, 6, 1, 2, 4, 5, 6, 3]


def test_a_dataset_of_needles_is_prepared_like_text(tmp_path: Path) -> None:
    prefix = str(tmp_path / "needles")
    needles = NeedleDocumentsConfig(documents=33, length=300, haystack="bundled")
    made = prepare(PrepareConfig(input="needles", output=prefix, needles=needles, seed=3))
    assert (made.documents, made.tokens) == (33, 33 * 300)
    assert read_metadata(prefix) == made
    again = prepare(PrepareConfig(input="needles", output=prefix + "2", needles=needles, seed=3))
    assert again == made
    assert Path(prefix + ".bin").read_bytes() == Path(prefix + "2.bin").read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "singel"}, r"needles\.task=singel: no such task.*recall_lines"),
        ({"documents": 0}, r"needles\.documents=0.*1 or more"),
        ({"workers": 0}, r"needles\.workers=0.*1 or more"),
        ({"length": 50}, r"needles\.length=50: a fact.*Use \d+ or more"),
        ({"task": "single", "length": 50}, r"needles\.length=50: .* \d+ tokens.* end of document takes one.*or more"),
        ({"share": [0.0, 1.0]}, r"needles\.share=.*0 < low <= high <= 1"),
        ({"share": [0.5, 1.5]}, r"needles\.share=.*0 < low <= high <= 1"),
        ({"questions_last": 1.5}, r"needles\.questions_last=1\.5.*0 to 1"),
        ({"facts": [8]}, r"needles\.facts=.*pair"),
        ({"haystack": "nowhere.txt"}, r"^needles\.haystack=nowhere\.txt"),
    ],
)
def test_settings_that_cannot_work_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(needle_documents(NeedleDocumentsConfig(**settings), BYTES, seed=1))
