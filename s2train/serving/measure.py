"""Measure one model in vLLM, in this process: first tokens, decoding, capacity.

At each length one sequence is added to an idle engine, whose first token is timed. It keeps decoding while others join
it, and decoding is timed whenever the batch has one of the sizes to measure: so each prompt is computed once.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
_WARM_STEPS = 4
_LARGEST_BLOCK = 256  # of a layout
_PREFILL_STEPS = 1024  # in which sequences decode that wait for others' prompts


def longest_sequence(request: Record) -> int:
    """Return the tokens of the longest sequence, in whole blocks."""
    tokens = max(request["lengths"]) + _decoded(request) + _PREFILL_STEPS
    return int(-(-tokens // _LARGEST_BLOCK) * _LARGEST_BLOCK)


def measure(folder: Path, request: Record) -> Iterator[Record]:
    """Measure one model.

    Args:
        request: lengths and batches (None: the most that fit) to measure, tokens to time in each batch, and further
            arguments of vllm.LLM as `vllm`.
    Yields:
        after each number, what is measured so far: hardware, and for each length seconds to the first token, sequences
        that fit, and for each batch its tokens/s and how often vLLM preempted a sequence.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the pages can be counted here
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # which a dense Llama would get, and an S2 model not
    import torch
    from vllm import LLM

    tokens = request["tokens"]
    settings = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "max_model_len": longest_sequence(request),
    }
    start = time.perf_counter()
    llm = LLM(str(folder), **settings | request["vllm"])
    config, load = llm.llm_engine.vllm_config, Load(llm)
    budget, most_sequences = config.scheduler_config.max_num_batched_tokens, config.scheduler_config.max_num_seqs
    found: Record = {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "start_s": time.perf_counter() - start,
        "cuda_graphs": config.compilation_config.cudagraph_mode.name,
        "pages": load.pages.num_blocks,
        "lengths": [],
    }
    for length in request["lengths"]:
        load.add(1, min(length, 2 * budget))  # compiles kernels: a prompt's beginning and a later chunk
        load.decode(_WARM_STEPS)
        load.stop()
        row: Record = {
            "length": length,
            "first_token_s": load.add(1, length),
            "fit": sequences_that_fit(load.pages, length + tokens),
            "batches": [],
        }
        found["lengths"].append(row)
        yield found
        most = sequences_that_join(load.pages, length, _decoded(request), budget)
        wanted = {min(most if batch is None else batch, most_sequences) for batch in request["batches"]}
        for size in sorted(batch for batch in wanted if 1 <= batch <= most):
            load.add(size - len(load.running), length)
            load.decode(_WARM_STEPS)
            speed = load.decode(tokens)
            row["batches"].append({"batch": size, "tokens_per_s": speed, "preempted": load.preempted()})
            yield found
        load.stop()


class Load:
    """Sequences with random prompts, which decode until they are stopped.

    Attributes:
        pages: vLLM's KVCacheConfig.
        running: names of the sequences.
    """

    def __init__(self, llm: Any) -> None:
        self._engine = llm.llm_engine
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self._model = self._engine.vllm_config.model_config
        self.pages = self._scheduler.kv_cache_config
        self.running: set[str] = set()
        self._added = 0

    def add(self, count: int, length: int) -> float:
        """Add sequences and return the seconds until each has a token."""
        import torch
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0,
            max_tokens=self._model.max_model_len - length,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompts = torch.randint(0, self._model.get_vocab_size(), (count, length)).tolist()
        start = time.perf_counter()
        waiting = set()
        for prompt in prompts:
            self._added += 1
            self._engine.add_request(str(self._added), {"prompt_token_ids": prompt}, sampling)
            waiting.add(str(self._added))
        self.running |= waiting
        while waiting:
            waiting -= self._step().keys()
        return time.perf_counter() - start

    def decode(self, steps: int) -> float:
        """Decode about `steps` tokens of each sequence; return tokens per second."""
        self._step()
        start, count = time.perf_counter(), 0
        while count < steps * len(self.running):
            count += sum(self._step().values())
        return count / (time.perf_counter() - start)

    def preempted(self) -> int:
        """Return how often running sequences have lost their pages."""
        return sum(request.num_preemptions for request in self._scheduler.requests.values())

    def stop(self) -> None:
        """Stop all sequences; their pages are free afterwards."""
        self._engine.abort_request(list(self.running))
        self.running = set()
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def _step(self) -> dict[str, int]:
        """Run a step of vLLM; return the new tokens of each sequence."""
        outputs = self._engine.step()
        if any(output.finished for output in outputs):
            raise RuntimeError(f"a sequence reached max_model_len={self._model.max_model_len} before it was stopped")
        return {output.request_id: len(output.outputs[0].token_ids) for output in outputs}


def sequences_that_fit(pages: Any, length: int) -> int:
    """Return how many sequences vLLM's pages hold while they decode.

    Each sequence has `length` tokens.

    Args:
        pages: vLLM's KVCacheConfig.
    """
    return int((pages.num_blocks - 1) // _pages_of_one(pages, length, prefill=False))


def sequences_that_join(pages: Any, length: int, decoded: int, budget: int) -> int:
    """Count sequences that decode at once, joining one by one.

    The last one's prompt needs more pages than its decoding, and the others get longer meanwhile.

    Args:
        length: tokens of a prompt.
        decoded: tokens that the first sequence decodes besides those during prompts.
        budget: tokens of a step.
    """
    longest = length + decoded + sequences_that_fit(pages, length) * -(-length // budget)
    free = pages.num_blocks - 1 - _pages_of_one(pages, longest, prefill=True)
    return 0 if free < 0 else 1 + int(free // _pages_of_one(pages, longest, prefill=False))


def _pages_of_one(pages: Any, length: int, *, prefill: bool) -> int:
    from s2train.serving.freeing import held_pages
    from s2train.serving.kv_cache import S2Spec

    count = 0
    for group in pages.kv_cache_groups:
        spec = group.kv_cache_spec
        if not isinstance(spec, S2Spec):
            count += -(-length // spec.block_size)
        elif prefill:
            count += spec.most_pages(length)
        else:
            query = (length - 1) // spec.layout_block
            count += int(held_pages(spec.last_uses())[: query + 1].max()) + len(spec.slots)
    return count


def _decoded(request: Record) -> int:
    return int((len(request["batches"]) + 1) * (request["tokens"] + _WARM_STEPS + 1))
