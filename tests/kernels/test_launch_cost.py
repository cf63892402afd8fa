"""What a call costs the host beside the launch itself."""

from types import SimpleNamespace

import pytest
import torch

from s2train.kernels import configs


def test_a_devices_shared_memory_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def properties(index: int) -> dict[str, int]:
        asked.append(index)
        return {"max_shared_mem": 1000 + index}

    active = SimpleNamespace(utils=SimpleNamespace(get_device_properties=properties))
    driver = SimpleNamespace(active=active)
    monkeypatch.setattr(configs, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=driver)))
    configs._shared_limit.cache_clear()
    try:
        limits = [configs.shared_limit(torch.device("cuda", index)) for index in (0, 1, 0, 0, 1)]
    finally:
        configs._shared_limit.cache_clear()
    assert limits == [1000, 1001, 1000, 1000, 1001]
    assert asked == [0, 1]


@pytest.mark.parametrize("dim", [1, 16, 17, 64, 65, 80, 128, 129, 256])
def test_head_dimensions_are_padded_to_powers_of_two(dim: int) -> None:
    width = configs.padded(dim)
    assert width >= 16
    assert width & (width - 1) == 0
    assert dim <= width < max(2 * dim, 17)
