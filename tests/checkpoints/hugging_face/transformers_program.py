"""What transformers makes of an exported folder, beside what the folder's own file does; prints JSON.

Argument: the folder. Imports nothing of s2train, as its users don't.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.generation.utils import GenerationMixin

NEW = 20


@torch.no_grad()
def main() -> None:
    folder = sys.argv[1]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).double().eval()
    assert isinstance(model, GenerationMixin)
    prompt = torch.randint(0, model.config.vocab_size, (2, 37))
    expected = prompt
    for _ in range(NEW):  # over no cache
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)

    def token_text(found: torch.Tensor) -> str:
        return "equal" if torch.equal(found, expected) else f"another: {found.tolist()}, not {expected.tolist()}"

    options = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": None,
        "attention_mask": torch.ones_like(prompt),
    }
    answers = {
        "with a cache": token_text(model.generate(prompt, **options)),
        "without": token_text(model.generate(prompt, use_cache=False, **options)),
    }
    try:
        answers["static cache"] = token_text(model.generate(prompt, cache_implementation="static", **options))
    except ValueError as error:
        answers["static cache"] = "rejected" if "a cache that grows" in str(error) else str(error)
    cache, new, tokens = DynamicCache(), prompt, prompt
    for _ in range(NEW):
        new = model(new, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, new], dim=1)
    answers["a cache by hand"] = token_text(tokens)
    # the second sequence, after padding on the left, as alone
    short = prompt[1:, -23:]
    batch = torch.cat([prompt[:1], torch.nn.functional.pad(short, (14, 0))])
    mask = torch.ones_like(batch)
    mask[1, :14] = 0
    found = model.generate(batch, **options | {"attention_mask": mask})
    alone = model.generate(short, **options | {"attention_mask": torch.ones_like(short)})
    same = torch.equal(found[0], expected[0]) and torch.equal(found[1, 14:], alone[0])
    answers["padded"] = "equal" if same else "another"
    sampling = options | {"do_sample": True, "temperature": 1.5}
    sampled = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        sampled.append(model.generate(prompt, use_cache=use_cache, **sampling))
    answers["sampled"] = "equal" if torch.equal(*sampled) else "another"
    beams = [model.generate(prompt, use_cache=use_cache, num_beams=3, **options) for use_cache in (True, False)]
    answers["beams"] = "equal" if torch.equal(*beams) else "another"
    model.save_pretrained(f"{folder}-again")
    again = AutoModelForCausalLM.from_pretrained(f"{folder}-again", trust_remote_code=True).double().eval()
    answers["saved again"] = token_text(again.generate(prompt, **options))
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
