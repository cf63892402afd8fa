from collections.abc import Iterator

import pytest
import torch.distributed as dist

from tests.data_fixtures import config, corpus  # noqa: F401


@pytest.fixture
def world_of_one() -> Iterator[None]:
    """megatron-core 0.16 blends only where torch.distributed is initialised."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
