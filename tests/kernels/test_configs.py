"""Launch configurations: fitting on small GPUs, and the same on every rank.

The compiler's own figures come from a separate process: Triton compiles only where it does not interpret.
"""

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from s2train.kernels import BlockLayout
from s2train.kernels.configs import config_for, shared_bytes

from tests.kernels.hopper_target import Driver
from tests.program import reported

KERNELS = ("forward", "dq", "dkdv")
# bytes of shared memory that a program may have: Turing, consumer Ampere and Ada, A100, Hopper
LIMITS = {75: 65_536, 86: 101_376, 80: 166_912, 90: 232_448}
DIMS = (8, 64, 80, 96, 128, 200, 256)


@pytest.mark.parametrize("limit", LIMITS.values())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_configurations_fit_the_device(limit: int, dtype: torch.dtype) -> None:
    for kernel, block, dim, v_dim in itertools.product(KERNELS, (16, 32, 64, 128, 256), DIMS, DIMS):
        config = config_for(kernel, block, dim, v_dim, dtype, limit)  # type: ignore[arg-type]
        assert shared_bytes(kernel, config, dim, v_dim, dtype.itemsize) <= limit  # type: ignore[arg-type]
        assert block % config.rows == block % config.steps == 0
        assert config.num_stages >= 1


def test_head_dimensions_beyond_256_are_rejected() -> None:
    with pytest.raises(ValueError, match="up to 256"):
        config_for("forward", 64, 257, 64, torch.bfloat16, None)


def test_a_device_that_nothing_fits_is_rejected() -> None:
    with pytest.raises(ValueError, match="does not fit this device's 8192 bytes"):
        config_for("dkdv", 64, 256, 256, torch.float32, 8192)


def test_no_kernel_is_tuned_while_it_runs() -> None:
    """Nor could ranks differ then: a configuration follows from sizes, dtype and the device's shared memory."""
    folder = Path(sys.modules["s2train.kernels"].__file__ or "").parent
    programs = {"check", "benchmarks"}
    paths = [path for path in folder.rglob("*.py") if not programs & set(path.relative_to(folder).parts)]
    tuned = [path.name for path in paths if "triton.autotune" in path.read_text() or "do_bench" in path.read_text()]
    assert len(paths) > 20
    assert set(tuned) <= {"tune.py"}  # a program of its own


# capability, dtype, block, head dimensions
COMPILED = [
    (86, "bfloat16", 128, 128, 128),
    *(
        pytest.param(case, marks=pytest.mark.long)
        for case in (
            (75, "float32", 64, 256, 256),
            (86, "float32", 64, 256, 256),
            (75, "float16", 128, 128, 128),
            (90, "bfloat16", 128, 256, 256),
            (86, "bfloat16", 64, 64, 64),
            (86, "bfloat16", 128, 256, 256),
            (75, "float16", 64, 256, 256),
            (80, "bfloat16", 128, 128, 64),
        )
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiled_kernels_fit_in_shared_memory_and_fuse_products_with_sums(case: tuple[Any, ...]) -> None:
    found = reported(__name__, case)
    assert len(found) == 4
    assert all(shared <= LIMITS[case[0]] for shared, _ in found.values()), found
    assert all(fuses for _, fuses in found.values())


def compiled_kernels(capability: int, dtype: str, block: int, dim: int, v_dim: int) -> dict[str, tuple[int, bool]]:
    """Shared memory of every portable kernel, and whether it fuses multiplications with additions.

    They are compiled for a GPU that is not there, where Triton's default is not to fuse, and launched nowhere.
    """
    import triton
    from s2train.kernels import backward, forward
    from s2train.kernels.spec import AttentionSpec
    from triton.runtime.jit import JITFunction

    os.environ["TRITON_DEFAULT_FP_FUSION"] = "0"
    found: dict[str, tuple[int, bool]] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        metadata = run(self, *args, grid=grid, warmup=True, **kwargs).metadata
        found[self.__name__] = metadata.shared, metadata.enable_fp_fusion

    # 7.5 has less memory, but no product that Triton still compiles for
    triton.runtime.driver.set_active(Driver(max(capability, 80)))
    JITFunction.run = compile_only
    for module in (forward, backward):
        module.shared_limit = lambda device: LIMITS[capability]  # type: ignore[assignment]
    length = 512
    q, k, v = (torch.empty(1, 2, length, d, dtype=getattr(torch, dtype)) for d in (dim, dim, v_dim))
    layout = BlockLayout.from_mask(torch.ones(2, length // block, length // block) > 0, block)
    spec = AttentionSpec(0.1, True, 0, None, "bhsd")
    out, lse = forward.forward(q, k, v, layout, spec)
    backward.backward(q, k, v, out, lse, out, lse, layout, spec)
    return found


if __name__ == "__main__":
    print(json.dumps(compiled_kernels(*json.loads(sys.argv[1]))))
