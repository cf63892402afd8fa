"""An export in vLLM on a GPU: our kernels over vLLM's pages, in CUDA graphs and without."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from triton import knobs

pytest.importorskip("vllm")

from s2train.layouts.patterns import Dense, LocalVertical
from tests.inference.cached_models import layers_of
from tests.serving.engine import assert_as_exact, engine, random_prompts
from tests.serving.exports import write_export

SPARSE = [LocalVertical(1, 3, head) for head in range(8)]


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_a_gpu_is_as_exact_as_the_exports_own_file(graphs: bool, block_size: int, tmp_path: Path) -> None:
    layout = layers_of(SPARSE, [Dense()] * 8, SPARSE, num_kv_heads=2, block_size=block_size)
    folder = write_export(tmp_path / "export", layout, length=2048, dtype="bfloat16")
    prompts = random_prompts(1000, 1, block_size, 3 * block_size + 1, 700)  # 5 sequences: padded to a captured size
    settings = {"max_model_len": 2048, "dtype": "bfloat16", "enforce_eager": not graphs, "max_num_batched_tokens": 300}
    with engine(folder, max_num_seqs=8, **settings) as served:
        mode = served.llm.llm_engine.vllm_config.compilation_config.cudagraph_mode.name
        assert mode == ("FULL_AND_PIECEWISE" if graphs else "NONE")
        with compiled_kernels() as names:
            found = served.generate(prompts, block_size + 20, logprobs=8)
        assert not [name for name in names if name.startswith("s2_")]  # all are compiled before the first request
        assert_as_exact(folder, prompts, found)


@contextmanager
def compiled_kernels() -> Iterator[list[str]]:
    """Names of the kernels that Triton compiles meanwhile."""
    names: list[str] = []
    hook = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **settings: names.append(settings["fn"].name)
    try:
        yield names
    finally:
        knobs.runtime.jit_post_compile_hook = hook
