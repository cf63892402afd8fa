"""Self attention of ranks that share KV heads.

They share them because there are more ranks than KV heads. Megatron divides the rows of the QKV projection evenly over
all ranks, so each weight, its gradient and its optimizer state exist once. The ranks then gather the projection's
output, and each takes its query heads and its KV head. The backward pass sums the gradients of a KV head over the ranks
that share it.
"""

from typing import Any

from megatron.core.transformer.attention import SelfAttention


class KVSharingSelfAttention(SelfAttention):
    """Megatron's self attention, which saves only this rank's heads for backward."""

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        found = super().get_query_key_value_tensors(*args, **kwargs)
        if self.config.num_query_groups >= self.world_size:
            return found
        query, key, value, *others = found
        # The rotation copies queries and keys. A view of the values would keep the heads of all ranks in memory.
        return (query, key, value.contiguous(), *others)
