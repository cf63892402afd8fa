"""The uncached greedy decoding that cached decoding is compared with."""

import torch
from torch import Tensor

from tests.inference.uncached import greedy_decode


def successor(tokens: Tensor, position_ids: Tensor, attention_mask: None) -> Tensor:
    """Logits that favour token + position, so that both inputs count; causal."""
    return torch.nn.functional.one_hot((tokens + position_ids) % 50, 50).float()


def test_each_token_depends_on_those_before_it() -> None:
    prompts = torch.randint(0, 50, (3, 7))
    out = greedy_decode(successor, prompts, 4)
    expected, last = [], prompts[:, -1]
    for position in range(6, 10):
        last = (last + position) % 50
        expected.append(last)
    assert torch.equal(out, torch.stack(expected, dim=1))


def test_every_pass_has_the_final_length() -> None:
    seen = set()

    def model(tokens: Tensor, position_ids: Tensor, attention_mask: None) -> Tensor:
        seen.add((tuple(tokens.shape), tuple(position_ids.shape)))
        return successor(tokens, position_ids, attention_mask)

    greedy_decode(model, torch.randint(0, 50, (2, 5)), 3)
    assert seen == {((2, 8), (2, 8))}
