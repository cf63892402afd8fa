"""The oracle against its definition and against torch's own attention."""

import torch
import torch.nn.functional as F

from s2train.kernels import BlockLayout, reference_attention
from tests.kernels.cases import Problem


def test_gradcheck_with_gqa_offset_and_empty_rows() -> None:
    (q, k, v), _, _, _ = Problem(heads=2, kv_heads=1, s_q=9, s_k=21, dim=3, dtype=torch.float64).make(
        torch.device("cpu")
    )
    mask = torch.rand(2, 2, 2) < 0.6
    mask[0, 1] = False
    layout = BlockLayout.from_mask(mask, 16)

    def attend(*qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = reference_attention(*qkv, layout, query_offset=13)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(attend, (q, k, v))


def test_all_blocks_kept_is_causal_attention() -> None:
    q, k, v = (torch.randn(2, 3, 50, 8, dtype=torch.float64) for _ in range(3))
    layout = BlockLayout.from_mask(torch.ones(3, 4, 4, dtype=torch.bool), 16)
    out, lse = reference_attention(q, k, v, layout, format="bhsd")
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    scores = (q @ k.mT / 8**0.5).masked_fill(~torch.ones(50, 50).tril().bool(), -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_documents_packed_are_documents_alone() -> None:
    q, k, v = (torch.randn(60, 1, 2, 8, dtype=torch.float64) for _ in range(3))
    layout = BlockLayout.from_mask(torch.rand(2, 4, 4) < 0.6, 16)
    out, lse = reference_attention(q, k, v, layout, cu_seqlens=torch.tensor([0, 21, 60]))
    for rows in (slice(0, 21), slice(21, 60)):
        alone, lse_alone = reference_attention(q[rows], k[rows], v[rows], layout)
        torch.testing.assert_close(out[rows], alone)
        torch.testing.assert_close(lse[..., rows], lse_alone)


def test_a_chunk_of_queries_equals_its_rows_of_the_whole() -> None:
    q, k, v = (torch.randn(60, 1, 2, 8, dtype=torch.float64) for _ in range(3))
    layout = BlockLayout.from_mask(torch.rand(2, 4, 4) < 0.6, 16)
    whole, _ = reference_attention(q, k, v, layout)
    chunk, _ = reference_attention(q[25:40], k, v, layout, query_offset=25)
    torch.testing.assert_close(chunk, whole[25:40])
