"""Sampling keeps the tokens that its definition names, with their probabilities."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from s2train.inference.sampling import Sampler, greedy, probabilities

VOCABULARY = 12


def kept_by_definition(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> list[float]:
    """Each token's probability, by a plain loop over the tokens from the likeliest on."""
    weights = [math.exp(value / temperature) for value in logits.tolist()]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])[:top_k]
    total, so_far, kept = sum(weights[token] for token in order), 0.0, list[int]()
    for token in order:
        if so_far / total >= top_p:
            break
        kept.append(token)
        so_far += weights[token]
    return [weights[token] / so_far if token in kept else 0.0 for token in range(len(weights))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (4, 1.0), (None, 0.7), (5, 0.6), (1, 1.0), (None, 1e-9)])
def test_probabilities_are_those_of_the_definition(temperature: float, top_k: int | None, top_p: float) -> None:
    logits = torch.randn(3, VOCABULARY, dtype=torch.float64)
    shares, tokens = probabilities(logits, temperature, top_k, top_p)
    found = torch.zeros_like(logits).scatter(-1, tokens, shares)
    expected = [kept_by_definition(one, temperature, top_k, top_p) for one in logits]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-9)


def test_draws_have_the_probabilities() -> None:
    logits = torch.randn(1, VOCABULARY)
    draws, sampler = 4000, Sampler(seed := int(torch.randint(2**31, ())), [0], 1.0, top_k=6, top_p=0.95)
    counts = Counter(int(sampler(logits)) for _ in range(draws))
    expected = kept_by_definition(logits[0].double(), 1.0, 6, 0.95)
    assert {token for token, share in enumerate(expected) if share == 0}.isdisjoint(counts)
    for token, share in enumerate(expected):
        deviation = math.sqrt(share * (1 - share) / draws)
        assert abs(counts[token] / draws - share) <= 6 * deviation + 3 / draws, f"seed {seed}"  # fails once in 10^7


def test_tokens_that_are_left_out_by_the_model_are_never_chosen() -> None:
    logits = torch.full((1, VOCABULARY), -math.inf)
    logits[0, 5] = -3.0
    sampler = Sampler(1, [0], 2.0)
    assert {int(sampler(logits)) for _ in range(50)} == {5}


@pytest.mark.parametrize("temperature", [1e-12, 1e-300])
def test_a_temperature_near_0_is_greedy(temperature: float) -> None:
    logits = torch.randn(4, VOCABULARY) * 50
    assert torch.equal(Sampler(1, range(4), temperature)(logits), greedy(logits))


def test_a_sequence_draws_the_same_in_any_batch() -> None:
    logits = torch.randn(3, VOCABULARY)
    together, alone = Sampler(3, [0, 1, 2], 1.0), [Sampler(3, [number], 1.0) for number in range(3)]
    for _ in range(20):
        separate = torch.cat([one(logits[number : number + 1]) for number, one in enumerate(alone)])
        assert torch.equal(together(logits), separate)


def test_seeds_and_sequences_draw_differently() -> None:
    logits = torch.zeros(1, 1000)
    drawn = {
        tuple(int(sampler(logits)) for _ in range(4))
        for seed in range(3)
        for number in range(3)
        for sampler in [Sampler(seed, [number], 1.0)]
    }
    assert len(drawn) == 9
