"""vLLM's tokens are those of the export's own file, and of our engine."""

import logging
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from s2train.layouts.patterns import Dense, LocalVertical
from s2train.layouts.patterns.window import SlidingWindow
from s2train.serving.plugin import register
from s2train.serving.versions import warn_of_version
from tests.inference.cached_models import NUM_BLOCKS, REGISTERED, hybrid_of, layers_of, registered
from tests.serving.engine import assert_as_exact, assert_greedy, engine, random_prompts
from tests.serving.exports import write_export
from tests.serving.our_engine_program import run as our_engine

pytestmark = [pytest.mark.slow]

LENGTH = 16 * NUM_BLOCKS
SPARSE = [LocalVertical(1, 3, head) for head in range(4)]
DENSE = [Dense()] * 4
THREE: dict[str, Any] = {"num_kv_heads": 3, "block_size": 16}
LAYOUTS = {
    **{name: lambda name=name: registered(name) for name in REGISTERED},
    **{name: lambda name=name: hybrid_of(name) for name in ("hybrid", "a dense head", "mqa")},
    "different heads in a group": lambda: hybrid_of("different heads in a group"),
    "three KV heads": lambda: layers_of([SlidingWindow(2, h) for h in range(6)], DENSE[:1] * 6, **THREE),
    "blocks of 64": lambda: layers_of(SPARSE, DENSE, SPARSE, num_kv_heads=4, block_size=64),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_tokens_are_those_of_the_exports_own_file(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]()
    length = LENGTH if layout.block_size == 16 else 320
    rotation, qk_norm = random.choice([0.5, 1.0]), random.choice([False, True])
    folder = write_export(tmp_path / "export", layout, length=length, partial_rotary_factor=rotation, qk_norm=qk_norm)
    size = layout.block_size
    prompts = random_prompts(1, size - 1, size, size + 1, 3 * size - 1, 3 * size, 3 * size + 1)
    with engine(folder, max_model_len=length) as served:
        assert_greedy(folder, prompts, served.tokens(prompts, 2 * size + 3))


def test_a_prefix_is_computed_once(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export", layers_of(SPARSE, DENSE, SPARSE, num_kv_heads=2, block_size=32))
    (prefix,) = random_prompts(200)
    prompts = [
        prefix,
        *(prefix[:cut] + more for cut, more in zip((200, 130, 64, 31), random_prompts(40, 3, 1, 9), strict=True)),
    ]
    with engine(folder, max_model_len=512, enable_prefix_caching=True) as served:
        for prompt, hit in zip(prompts, (0, 192, 128, 64, 0), strict=True):
            (output,) = served.generate([prompt], 20)
            assert_greedy(folder, [prompt], [list(output.outputs[0].token_ids)])
            assert output.num_cached_tokens == hit


def test_a_prefix_may_be_found_in_the_step_that_computes_it(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export", layers_of(SPARSE, DENSE, SPARSE, num_kv_heads=2, block_size=32))
    prefix, more = random_prompts(200, 9)
    prompts = [prefix, prefix, prefix[:193], prefix[:130] + more]  # 193: one token after the pages that are found
    with engine(folder, max_model_len=512, enable_prefix_caching=True, max_num_batched_tokens=1024) as served:
        assert_greedy(folder, prompts, served.tokens(prompts, 20))
        assert_greedy(folder, prompts, served.tokens(prompts, 20))


def test_preempted_sequences_go_on_with_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_export(tmp_path / "export", layers_of(SPARSE, DENSE, SPARSE, num_kv_heads=2, block_size=32))
    prompts = random_prompts(60, 90, 33, 70)
    with engine(folder, max_model_len=256, num_gpu_blocks_override=60, enable_prefix_caching=False) as served:
        preempted: list[Any] = []
        preempt = type(served.scheduler)._preempt_request
        monkeypatch.setattr(
            type(served.scheduler),
            "_preempt_request",
            lambda self, *given: (preempted.append(1), preempt(self, *given))[1],
        )
        assert_greedy(folder, prompts, served.tokens(prompts, 120))
        assert preempted


def test_dropped_pages_are_used_by_others_meanwhile(tmp_path: Path) -> None:
    """More sequences are held at once than pages of everything would allow."""
    folder = write_export(tmp_path / "export", layers_of([SlidingWindow(1)] * 4, num_kv_heads=2, block_size=16))
    prompts = random_prompts(*[30] * 6)
    with engine(folder, max_model_len=512, num_gpu_blocks_override=45, enable_prefix_caching=False) as served:
        used: list[int] = []
        take = served.pool.get_new_blocks
        served.pool.get_new_blocks = lambda count: (take(count), used.append(44 - served.pool.get_num_free_blocks()))[0]
        assert_greedy(folder, prompts, served.tokens(prompts, 200))
    pages_of_everything = 6 * 2 * -(-230 // 16)
    assert max(used) <= 44 < pages_of_everything


def test_bf16_is_as_exact_as_the_exports_own_file(tmp_path: Path) -> None:
    layout = layers_of(SPARSE, DENSE, SPARSE, num_kv_heads=2, block_size=32)
    folder = write_export(tmp_path / "export", layout, dtype="bfloat16")
    prompts = random_prompts(100, 33)
    with engine(folder, max_model_len=512, dtype="bfloat16") as served:
        assert_as_exact(folder, prompts, served.generate(prompts, 30, logprobs=8))


@pytest.mark.long
def test_two_tensor_parallel_ranks_give_the_same_tokens(tmp_path: Path) -> None:
    layers = [SPARSE, DENSE, [LocalVertical(1, 4, head) for head in range(4)]]
    folder = write_export(tmp_path / "export", layers_of(*layers, num_kv_heads=4, block_size=32))
    prompts = random_prompts(31, 100)
    with engine(folder, max_model_len=512, tensor_parallel_size=2) as served:
        assert_greedy(folder, prompts, served.tokens(prompts, 70))


def test_an_untested_version_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("vllm.s2train")
    logger.addHandler(caplog.handler)
    try:
        warn_of_version()
        assert not caplog.records
        monkeypatch.setattr("vllm.__version__", "0.99.1+cpu")
        warn_of_version()
    finally:
        logger.removeHandler(caplog.handler)
    assert set(caplog.messages) == {"s2train is tested with vLLM 0.24.0, and this is 0.99.1"}


def test_a_version_that_lacks_a_part_still_serves_other_models(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr("vllm.model_executor.models.config.MODELS_CONFIG_MAP")
    logger = logging.getLogger("vllm.s2train")
    logger.addHandler(caplog.handler)
    try:
        register()
    finally:
        logger.removeHandler(caplog.handler)
    (message,) = set(caplog.messages)
    assert message.startswith("s2train's exports can't be served: vLLM 0.24.0 lacks a part (cannot import")
    assert message.endswith("Install one of 0.24.0")


def test_the_log_names_what_is_freed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_export(tmp_path / "export", layers_of([SlidingWindow(1)] * 4, num_kv_heads=2, block_size=16))
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    try:
        with engine(folder, max_model_len=160):
            pass
    finally:
        logger.removeHandler(caplog.handler)
    (line,) = {record.getMessage() for record in caplog.records if "pages are freed" in record.getMessage()}
    assert (
        "for each KV head: a sequence of 160 tokens holds at most 2 of 20 pages of its 1 sparse layers (10.0%)" in line
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype=fp8: sparse layers keep"),
        ({"block_size": 48}, "block_size=48: doesn't divide the layout's block of 32"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size=3: doesn't divide the model's 2 KV heads"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative_config=ngram"),
    ],
)
def test_vllm_rejects_at_load(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export", layers_of(SPARSE, num_kv_heads=2, block_size=32))
    with pytest.raises(ValueError, match=words), engine(folder, max_model_len=256, **settings):
        pass


def test_tokens_are_those_of_our_engine(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    folder = write_export(tmp_path / "export", layers_of(SPARSE, DENSE, SPARSE, num_kv_heads=2, block_size=32))
    prompts = random_prompts(70, 70)
    ours, _ = our_engine(folder, prompts, 50)
    with engine(folder, max_model_len=512) as served:
        found = served.tokens(prompts, 50)
        assert_greedy(folder, prompts, found)
        assert_greedy(folder, prompts, ours)
        assert [tokens[:20] for tokens in found] == [tokens[:20] for tokens in ours]
