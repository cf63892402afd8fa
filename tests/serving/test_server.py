"""vLLM's HTTP server answers for an export."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("megatron.core")

from s2train.checkpoints.hugging_face.modeling_s2 import S2ForCausalLM
from s2train.checkpoints.hugging_face.tokenizer_files import write_tokenizer
from s2train.data.tokenizers import ByteTokenizer
from s2train.layouts.patterns import Dense, LocalVertical
from tests.inference.cached_models import layers_of
from tests.serving.exports import write_export
from tests.serving.our_engine_program import run as our_engine
from tests.serving.server import server

SPARSE = [LocalVertical(1, 3, head) for head in range(4)]


@pytest.mark.slow
def test_vllm_serve_completes_as_our_engine_does(tmp_path: Path) -> None:
    tokenizer, count = ByteTokenizer(), 40
    layout = layers_of(SPARSE, [Dense()] * 4, SPARSE, num_kv_heads=2, block_size=32)
    folder = write_export(tmp_path / "export", layout, vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eod)
    write_tokenizer(folder, tokenizer, 512)
    prompts = torch.randint(0, 256, (2, 70)).tolist()
    with server(folder, tmp_path, "--dtype", "float32") as served:
        answer = served.post(
            "/v1/completions", prompt=prompts, max_tokens=count, temperature=0, logprobs=0, ignore_eos=True,
            return_token_ids=True,
        )  # fmt: skip
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    tokens = [choice["token_ids"] for choice in choices]
    found = torch.tensor([choice["logprobs"]["token_logprobs"] for choice in choices], dtype=torch.float64)
    our_tokens, ours = our_engine(folder, prompts, count)
    assert [row[:20] for row in tokens] == [row[:20] for row in our_tokens]  # later ones may depend on rounding
    exact, rounded = (_log_probabilities(folder, dtype, prompts, tokens) for dtype in (torch.float64, torch.float32))
    # each at most twice the error of the export's own file in the same dtype
    assert (found - ours)[:, :20].norm() <= 4 * (rounded - exact)[:, :20].norm()
    assert (found - exact).norm() <= 2 * (rounded - exact).norm()


def _log_probabilities(
    folder: Path, dtype: torch.dtype, prompts: list[list[int]], tokens: list[list[int]]
) -> torch.Tensor:
    model = S2ForCausalLM.from_folder(str(folder)).to(dtype)
    given, chosen = torch.tensor(prompts), torch.tensor(tokens)
    with torch.no_grad():
        logits = model(torch.cat([given, chosen], dim=1)[:, :-1]).logits[:, given.shape[1] - 1 :]
    return logits.double().log_softmax(-1).gather(-1, chosen[..., None])[..., 0]
