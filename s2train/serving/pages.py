"""How KV heads and blocks lie in vLLM's pages.

vLLM counts pages by tokens: a page of t tokens holds them for all KV heads of a layer. A sparse layer uses the same
memory otherwise, so that a page can be freed for one head: it holds one block of B tokens of `heads_per_page` KV heads.
The H KV heads of a block then have `slots` = H / heads_per_page pages, and a sequence's page table lists them block by
block: the page of block j and slot s is entry j · slots + s. To vLLM such a page has t = B / slots tokens.

Dense layers use vLLM's own backends. Their pages must have the same number of bytes, and hold 16 tokens or a multiple:
a dense layer is divided into attentions of fewer KV heads where it must be.
"""

import math
from dataclasses import dataclass

from s2train.errors import ConfigError

_TOKENS = 16  # vLLM's backends take pages of a multiple of so many tokens


@dataclass(frozen=True)
class PagePlan:
    """Pages of the layers of one tensor parallel rank.

    Attributes:
        block_size: B, tokens of a layout's block.
        num_kv_heads: H, KV heads of a layer on the rank.
        dense_tokens: tokens of a dense layer's page.
    """

    block_size: int
    num_kv_heads: int
    dense_tokens: int

    @classmethod
    def choose(cls, block_size: int, num_kv_heads: int, page_size: int | None = None) -> "PagePlan":
        """Choose pages; the fewest attentions for each dense layer.

        Args:
            page_size: tokens of a dense layer's page, as `--block-size` gives them; None: any.
        Raises:
            ConfigError: the page size doesn't divide the block, or pages of sparse and dense layers would differ.
        """
        heads_per_page = num_kv_heads // math.gcd(num_kv_heads, block_size)
        tokens = block_size * heads_per_page  # of one KV head, in a page
        sizes = [
            tokens // heads
            for heads in range(num_kv_heads, 0, -1)
            if num_kv_heads % heads == 0 and tokens % (heads * _TOKENS) == 0
        ]
        if page_size is None:
            return cls(block_size, num_kv_heads, sizes[0])
        fitting = [size for size in sizes if block_size % size == 0]
        remedy = f"Leave --block-size out, or set it to one of {', '.join(map(str, fitting))}"
        if block_size % page_size:
            raise ConfigError("block_size", page_size, f"doesn't divide the layout's block of {block_size}", remedy)
        if page_size not in sizes:
            problem = f"pages of {num_kv_heads} KV heads in blocks of {block_size} can't have so many tokens"
            raise ConfigError("block_size", page_size, problem, remedy)
        return cls(block_size, num_kv_heads, page_size)

    @property
    def heads_per_page(self) -> int:
        """Number of KV heads that share a sparse layer's page.

        It is 1 if H divides B.
        """
        return self.num_kv_heads // math.gcd(self.num_kv_heads, self.block_size)

    @property
    def slots(self) -> int:
        """Pages of one block in a sparse layer."""
        return self.num_kv_heads // self.heads_per_page

    @property
    def page_tokens(self) -> int:
        """Tokens of a sparse layer's page, as vLLM counts them."""
        return self.block_size // self.slots

    @property
    def dense_heads(self) -> int:
        """KV heads of each attention that a dense layer is divided into."""
        return self.block_size * self.heads_per_page // self.dense_tokens
