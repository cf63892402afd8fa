"""Greedy decoding."""

import pytest
import torch
from torch import Tensor

from tests.inference.uncached import greedy_decode


def successor(tokens: Tensor, position_ids: Tensor, attention_mask: None) -> Tensor:
    """Logits that favour token + position, so that both inputs count; causal."""
    return torch.nn.functional.one_hot((tokens + position_ids) % 50, 50).float()


def test_each_token_follows_from_those_before_it() -> None:
    prompts = torch.randint(0, 50, (3, 7))
    out = greedy_decode(successor, prompts, 4)
    expected, last = [], prompts[:, -1]
    for position in range(6, 10):
        last = (last + position) % 50
        expected.append(last)
    assert torch.equal(out, torch.stack(expected, dim=1))


def test_prompts_are_left_as_they_were() -> None:
    prompts = torch.randint(0, 50, (2, 5))
    before = prompts.clone()
    greedy_decode(successor, prompts, 2)
    assert torch.equal(prompts, before)


def test_every_pass_has_the_final_length() -> None:
    seen = set()

    def model(tokens: Tensor, position_ids: Tensor, attention_mask: None) -> Tensor:
        seen.add((tuple(tokens.shape), tuple(position_ids.shape)))
        return successor(tokens, position_ids, attention_mask)

    greedy_decode(model, torch.randint(0, 50, (2, 5)), 3)
    assert seen == {((2, 8), (2, 8))}


def test_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="training mode"):
        greedy_decode(torch.nn.Linear(1, 1), torch.zeros(1, 1, dtype=torch.int64), 1)
