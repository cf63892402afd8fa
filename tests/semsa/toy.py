"""A layer whose right layout is known: one head copies from a fixed distance, the others look around themselves."""

from dataclasses import asdict

import torch
from s2train.kernels.block_statistics import block_effects, output_delta, rule_effects
from s2train.kernels.reference import reference_attention
from torch import Tensor

from s2train.config import ModelConfig
from s2train.layouts.patterns.base import Pattern
from s2train.semsa.config import LibraryConfig
from s2train.semsa.layouts import Candidates
from s2train.semsa.profile import Profile, about_profile, ranked_columns
from s2train.semsa.rules import Rule, make_library, rule_masks

HEADS, GROUPS, BLOCK, BLOCKS, WIDTH = 4, 2, 16, 16, 32
LENGTH = BLOCK * BLOCKS
FAR = 10 * BLOCK  # from where the copying head copies
LIBRARY = LibraryConfig(spans=[[1, 0], [2, 0], [4, 0], [12, 0], [2, 0.25]], stripes=[[1, 4]], sinks=0)


def attended(distances: list[int]) -> tuple[Tensor, ...]:
    """q, k, v, out, lse and dout of heads that each read the position `distance` before.

    The loss is half the squared distance of each head's output from its values at that distance, with noise in what is
    wanted, as in a calibrated model. Each head has its own keys and values.
    """
    generator = torch.Generator().manual_seed(0)
    position = torch.nn.functional.normalize(
        torch.randn(LENGTH, WIDTH, generator=generator, dtype=torch.float64), dim=-1
    )
    keys = (position * 12)[:, None, None].expand(-1, 1, len(distances), -1)
    values = torch.randn(LENGTH, 1, len(distances), WIDTH, generator=generator, dtype=torch.float64)
    read = [[max(0, i - distance) for i in range(LENGTH)] for distance in distances]
    queries = torch.stack([position[row] * WIDTH**0.5 for row in read], 1)[:, None]
    queries, keys, values = (x.clone().requires_grad_() for x in (queries, keys, values))
    from s2train.kernels.layout import BlockLayout

    full = BlockLayout.from_mask(torch.ones(len(distances), BLOCKS, BLOCKS, dtype=torch.bool).tril(), BLOCK)
    out, lse = reference_attention(queries, keys, values, full)
    wanted = out.detach() + torch.randn(out.shape, generator=generator, dtype=torch.float64)
    ((out - wanted).square().sum() / 2).backward(inputs=[queries], retain_graph=True)
    return queries.detach(), keys.detach(), values.detach(), out.detach(), lse.detach(), out.detach() - wanted


def profile_of(distances: list[int]) -> Profile:
    """The profile of such a layer."""
    rules = make_library(LIBRARY)
    blocks, effects = (part.unsqueeze(1).float().numpy() for part in _effects(distances, rules))
    model = ModelConfig("toy", 1, HEADS * WIDTH, 64, HEADS, GROUPS, WIDTH, 64)
    about = about_profile(
        rules, checkpoint="runs/toy", weights="0", model=asdict(model), seq_length=LENGTH, block_size=BLOCK,
        tokens=LENGTH, samples=1,
    )  # fmt: skip
    columns = ranked_columns(blocks, GROUPS) if any(rule.takes_columns for rule in rules) else None
    return Profile(blocks, effects, columns, about)


def _effects(distances: list[int], rules: tuple[Rule, ...]) -> tuple[Tensor, Tensor]:
    q, k, v, out, lse, dout = attended(distances)
    tensors = (q, k, v, lse, dout, output_delta(out, dout))
    masks = rule_masks(
        rules, range(HEADS), HEADS // GROUPS, torch.zeros(HEADS, BLOCKS, dtype=torch.int64).numpy(), BLOCKS
    )
    return block_effects(*tensors, block_size=BLOCK), rule_effects(*tensors, masks, block_size=BLOCK)


def pattern(profile: Profile, layer: int, head: int, rule: int) -> Pattern:
    candidates = Candidates.of(profile)
    return candidates.patterns[int(candidates.index[layer, head, rule])]
