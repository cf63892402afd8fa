"""How KV heads and blocks lie in vLLM's pages."""

import pytest

from s2train.errors import ConfigError
from s2train.serving.pages import PagePlan


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 4, 6, 8, 12, 32, 96])
@pytest.mark.parametrize("block_size", [16, 64, 128, 256])
def test_pages_of_sparse_and_dense_layers_have_as_many_bytes(block_size: int, num_kv_heads: int) -> None:
    plan = PagePlan.choose(block_size, num_kv_heads)
    of_a_block = plan.slots * plan.page_tokens
    assert of_a_block == block_size
    assert plan.page_tokens * num_kv_heads == plan.dense_tokens * plan.dense_heads == block_size * plan.heads_per_page
    assert num_kv_heads % plan.dense_heads == 0
    assert plan.dense_tokens % 16 == 0


@pytest.mark.parametrize(
    ("block_size", "num_kv_heads", "heads_per_page", "dense_heads"),
    [(64, 32, 1, 4), (128, 8, 1, 8), (64, 8, 1, 4), (64, 12, 3, 12), (16, 2, 1, 1), (64, 3, 3, 3)],
)
def test_a_page_is_one_heads_where_the_heads_divide_the_block(
    block_size: int, num_kv_heads: int, heads_per_page: int, dense_heads: int
) -> None:
    plan = PagePlan.choose(block_size, num_kv_heads)
    assert (plan.heads_per_page, plan.dense_heads) == (heads_per_page, dense_heads)


def test_a_chosen_page_size_divides_the_block() -> None:
    assert PagePlan.choose(64, 8, 32).dense_heads == 2
    with pytest.raises(
        ConfigError, match=r"^block_size=48: doesn't divide the layout's block of 64. Leave .* 16, 32, 64$"
    ):
        PagePlan.choose(64, 8, 48)
    with pytest.raises(ConfigError, match=r"^block_size=16: pages of 2 KV heads in blocks of 64 can't .* 32, 64$"):
        PagePlan.choose(64, 2, 16)
