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
    # no other test's devices: the answers are kept
    limits = [configs.shared_limit(torch.device("cuda", index)) for index in (70, 71, 70, 70, 71)]
    assert limits == [1070, 1071, 1070, 1070, 1071]
    assert asked == [70, 71]


@pytest.mark.parametrize("dim", [1, 16, 17, 64, 65, 80, 128, 129, 256])
def test_head_dimensions_are_padded_to_powers_of_two(dim: int) -> None:
    width = configs.padded(dim)
    assert width >= 16
    assert width & (width - 1) == 0
    assert dim <= width < max(2 * dim, 17)
