"""vLLM's engine in this process, on a CPU unless there is a GPU."""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

# Before vLLM's first import: one process, no compiling on a CPU, no network.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="INFO",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)
if not torch.cuda.is_available():
    os.environ["TORCHDYNAMO_DISABLE"] = "1"

from vllm import LLM, SamplingParams

from s2train.checkpoints.hugging_face.modeling_s2 import S2ForCausalLM
from tests.serving.exports import VOCABULARY


class Engine:
    """An export in vLLM.

    Attributes:
        scheduler: of vLLM's engine core.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        defaults = {
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "dtype": "float32",
            "max_num_batched_tokens": 40,  # prompts are prefilled in chunks, whose ends no block has
            "max_num_seqs": 6,
            "num_gpu_blocks_override": 600,
        }
        self.llm = LLM(str(folder), **defaults | settings)
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool

    def generate(self, prompts: Sequence[list[int]], count: int, **sampling: Any) -> list[Any]:
        """Return vLLM's outputs of `count` greedy tokens for each prompt; no page is left in use."""
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, **sampling)
        found = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1  # but the null page
        return found

    def tokens(self, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in self.generate(prompts, count)]


@contextmanager
def engine(folder: Path, **settings: Any) -> Iterator[Engine]:
    """Open an engine; its processes have ended and its memory is free afterwards."""
    opened = Engine(folder, **settings)
    try:
        yield opened
    finally:
        opened.llm.llm_engine.engine_core.shutdown()
        del opened
        gc.collect()


def random_prompts(*lengths: int) -> list[list[int]]:
    return [torch.randint(0, VOCABULARY, (length,)).tolist() for length in lengths]


def assert_greedy(folder: Path, prompts: Sequence[list[int]], found: Sequence[list[int]]) -> None:
    """Assert that each token is the likeliest after those before it, by the export's own file.

    Where two are as likely, rounding may choose: both logits may have twice the file's own error in fp32.
    """
    model, exact = (S2ForCausalLM.from_folder(str(folder)) for _ in range(2))
    exact = exact.double()
    for prompt, tokens in zip(prompts, found, strict=True):
        with torch.no_grad():
            given = torch.tensor([prompt + tokens[:-1]])
            logits, rounded = (m(given).logits[0, len(prompt) - 1 :].double() for m in (exact, model))
        behind = logits.amax(-1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert behind.max() <= 4 * (logits - rounded).abs().max(), (len(prompt), behind)


def assert_as_exact(folder: Path, prompts: Sequence[list[int]], found: Sequence[Any]) -> None:
    """Assert that log-probabilities of vLLM's outputs have at most twice the error of the export's own file.

    The error is the norm of all differences from float64.
    """
    own, exact = (S2ForCausalLM.from_folder(str(folder)) for _ in range(2))
    exact = exact.double()
    for prompt, output in zip(prompts, found, strict=True):
        tokens = torch.tensor([prompt + list(output.outputs[0].token_ids)])
        with torch.no_grad():
            of_file, of_exact = (
                m(tokens).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for m in (own, exact)
            )
        squares = torch.zeros(2, dtype=torch.float64)
        for position, likeliest in enumerate(output.outputs[0].logprobs):
            index = torch.tensor(list(likeliest))
            given = torch.tensor([value.logprob for value in likeliest.values()], dtype=torch.float64)
            right = of_exact[position, index]
            squares += torch.stack([(given - right).square().sum(), (of_file[position, index] - right).square().sum()])
        assert squares[0] < 4 * squares[1]
