"""Cached decoding agrees with the uncached forward, and keeps only the pages that the layout needs."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from s2train.layouts.patterns.registry import PATTERNS
from tests.inference.cached_models import BLOCK, DIVIDED, MODELS, NUM_BLOCKS
from tests.program import results_of

pytestmark = [pytest.mark.slow]

ROOT = Path(__file__).parents[2]
Results = dict[str, dict[str, Any]]


def measure(processes: int, *arguments: str, interpret: bool = False, device: str = "") -> Results:
    seed = str(random.randrange(2**31))
    print("seed", seed)
    program, processes = "tests.inference.cached_program", processes if processes > 1 else 0
    if not device:
        return results_of(program, seed, *arguments, processes=processes, interpret=interpret)
    done = subprocess.run(
        [sys.executable, "-m", program, seed, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": device, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def alone() -> Results:
    return measure(1)


@pytest.fixture(scope="module")
def tensor_parallel() -> Results:
    return measure(2)


@pytest.fixture(scope="module")
def registered() -> Results:
    return measure(1, "registered")


def assert_agrees(result: dict[str, Any]) -> None:
    assert_agrees_on_a_rank(result)
    assert result["held"] == result["brute"]  # counted by definition


def assert_agrees_on_a_rank(result: dict[str, Any]) -> None:
    # As close to float64 as the uncached forward is.
    assert result["error"] <= 2 * result["plain_error"]
    assert result["plain_error"] < 1e-5 * result["scale"]
    # Counted by the free list, by the closed form and in the tables.
    assert result["held"] == result["predicted"]
    assert result["stored"] == [[count, count] for count in result["held"]]


@pytest.mark.parametrize("prefill", ["", " in chunks"])
@pytest.mark.parametrize("model", MODELS)
def test_decoding_agrees_with_the_uncached_forward(alone: Results, model: str, prefill: str) -> None:
    assert_agrees(alone[model + prefill])


def test_the_triton_kernels_agree_in_a_model() -> None:
    for result in measure(1, "triton", interpret=True).values():
        assert_agrees(result)


def test_the_triton_kernels_agree_under_tensor_parallel() -> None:
    assert_agrees_on_a_rank(measure(2, "triton", interpret=True)["tp"])


@pytest.mark.parametrize("kind", PATTERNS)
def test_every_registered_pattern_agrees_with_the_uncached_forward(registered: Results, kind: str) -> None:
    assert_agrees(registered[kind])


def test_a_layout_schedule_across_layers_agrees_with_the_uncached_forward(registered: Results) -> None:
    assert_agrees(registered["rotating"])


@pytest.mark.parametrize("prompt", [127, 128, 129])
def test_blocks_of_64_with_a_border_near_the_prompts_end_agree(registered: Results, prompt: int) -> None:
    assert_agrees(registered[f"64 {prompt}"])


def test_a_cache_longer_than_a_files_masks_is_rejected(registered: Results) -> None:
    message = str(registered["longer than masks"])
    assert f"masks.npz: its masks end at {NUM_BLOCKS} blocks, and the sequence has {NUM_BLOCKS + 1}" in message


@pytest.mark.gpu
def test_on_a_gpu_steps_replayed_from_a_graph_equal_eager_steps() -> None:
    for result in measure(1, "cuda", device=os.environ.get("CUDA_VISIBLE_DEVICES", "0")).values():
        assert result["replayed_as_run"]
        assert result["difference"] < 1e-5  # ten times the rounding of float32 on a CPU
        assert result["agrees"]


def test_prompts_may_end_at_every_position_of_a_block(alone: Results) -> None:
    cases = [name for name in alone if name.startswith("hybrid ") and name != "hybrid in chunks"]
    assert len(cases) == 6
    for name in cases:
        assert_agrees(alone[name])


@pytest.mark.parametrize("model", ["sparse", "sinks", "hybrid", "scattered"])
def test_a_sparse_layout_keeps_fewer_pages_than_a_dense_cache(alone: Results, model: str) -> None:
    assert max(alone[model]["held"]) < 0.9 * alone[model]["dense"]


def test_a_dense_model_keeps_everything_until_the_end(alone: Results) -> None:
    held, dense = alone["dense"]["held"], alone["dense"]["dense"]
    assert max(held) == dense
    assert held[-1] == 0  # no query comes after the last token


@pytest.mark.parametrize("model", DIVIDED)
def test_tensor_parallel_ranks_agree_with_the_uncached_forward(tensor_parallel: Results, model: str) -> None:
    for prefill in ("", " in chunks"):
        assert_agrees_on_a_rank(tensor_parallel[model + prefill])


def test_ranks_that_share_a_kv_head_keep_only_their_own_heads_for_the_backward(tensor_parallel: Results) -> None:
    saved = tensor_parallel["saved"]
    assert 0 < saved["largest"] <= saved["stream"] < saved["all_heads"]


def assert_losses_agree(result: dict[str, Any]) -> None:
    assert result["error"] <= 2 * result["plain_error"]
    assert result["plain_error"] < 1e-5 * result["scale"]
    assert result["likeliest"] == 1
    assert result["agrees"]  # the cache holds what the layout needs


@pytest.mark.parametrize("model", MODELS)
def test_losses_agree_with_the_uncached_forward(alone: Results, model: str) -> None:
    assert_losses_agree(alone[f"losses {model}"])


@pytest.mark.parametrize("model", DIVIDED)
def test_losses_on_tensor_parallel_ranks_agree(tensor_parallel: Results, model: str) -> None:
    assert_losses_agree(tensor_parallel[f"losses {model}"])


def test_sampled_sequences_of_a_batch_are_those_sampled_alone(alone: Results) -> None:
    result = alone["sampled"]
    assert result["together"] == result["alone"]
    assert len({str(result[name]) for name in ("together", "again", "greedy")}) == 3


def test_sequences_of_a_batch_continue_as_when_decoded_alone(alone: Results) -> None:
    assert alone["unequal_prompts"]["together"] == alone["unequal_prompts"]["alone"]


def test_sequences_of_unequal_lengths_keep_the_pages_that_each_needs(alone: Results) -> None:
    assert alone["unequal_pages"]["held"] == alone["unequal_pages"]["brute"]


def test_tokens_after_the_end_are_filled_with_the_end_token(alone: Results) -> None:
    result = alone["end_of_document"]
    eod, ends = result["eod"], 0
    for free, ended in zip(result["free"], result["ended"], strict=True):
        stop = free.index(eod) if eod in free else len(free)
        assert ended == free[:stop] + [eod] * (len(free) - stop)
        ends += stop < len(free)
    assert ends


def test_a_finished_sequence_frees_its_pages_and_leaves_others_unchanged(alone: Results) -> None:
    result = alone["finished_sequences"]
    assert result["same"]
    assert result["agrees"]
    assert result["after"] == result["before"] // 2 > 0


def test_models_and_prompts_that_cannot_be_decoded_are_rejected(alone: Results) -> None:
    messages = alone["rejections"]
    assert f"{BLOCK} tokens: open" in messages["full"]
    assert "already attached" in messages["nested"]
    assert "only tensor parallel models" in messages["parallel"]
    assert "training mode" in messages["training"]
    assert "the model's tokens are 0 to " in messages["token"]
    assert "prompts must be int64 [b, s]" in messages["flat"]


def test_the_context_leaves_nothing_attached(alone: Results) -> None:
    assert alone["rejections"]["attached"] == 0
    assert alone["forgotten"] == {"gone": True, "same": True}


def test_a_dense_layers_later_chunk_is_the_same_by_the_sparse_op(alone: Results) -> None:
    assert 0 <= alone["later_queries"]["difference"] < 1e-6
