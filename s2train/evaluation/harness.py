"""Runs tasks of lm-evaluation-harness on a loaded model, over the KV cache.

Only this module imports lm_eval, which the extra `eval` installs.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from s2train.data.tokenizers import Tokenizer
from s2train.errors import ConfigError
from s2train.evaluation.generation_settings import stop_texts, tokens_to_generate
from s2train.evaluation.scoring import Scorer
from s2train.evaluation.windows import Window, batches, cut
from s2train.generation.text import TextStream
from s2train.inference.generation import pad_prompts, stream
from s2train.inference.sampling import Choose, Sampler, among, greedy


@dataclass(frozen=True)
class _Question:
    """A text to continue, and its place among the requests."""

    number: int
    task: str
    ids: list[int]
    settings: dict[str, Any]


class CachedLM(TemplateLM):  # type: ignore[misc, unused-ignore]
    """The harness's interface to a model of ours.

    Every tensor parallel rank answers all requests. Texts are encoded without special tokens; an end token stands
    before a text without context.

    Args:
        length: most tokens that the model sees at once; longer contexts lose their beginning.
    """

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer, length: int, batch_size: int, seed: int) -> None:
        super().__init__()
        self._scorer, self._tokenizer, self._length = scorer, tokenizer, length
        self._batch_size, self._seed = batch_size, seed

    @property
    def eot_token_id(self) -> int:
        """Id of the end token."""
        return self._tokenizer.eod

    @property
    def max_length(self) -> int:
        """Most tokens that the model sees at once."""
        return self._length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode a text; our tokenizers add no special tokens."""
        return list(self._tokenizer.encode(string))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        windows = []
        for _names, context, continuation in requests:
            if not continuation or len(continuation) > self._length:
                problem = f"a continuation of {len(continuation)} tokens can't be scored"
                raise ConfigError("length", self._length, problem, "Set a longer length, or another task")
            # a context of white space alone goes to the continuation
            ids = np.array([*(context or [self.eot_token_id]), *continuation][-(self._length + 1) :], dtype=np.int64)
            windows.append(Window(ids[:-1], ids[1:], len(ids) - 1 - len(continuation)))
        return self._sums(windows)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Sum the log-likelihoods of whole texts, cut into windows that don't overlap."""
        sums, owners, windows = [0.0] * len(requests), list[int](), list[Window]()
        for number, request in enumerate(requests):
            ids = np.array([self.eot_token_id, *self.tok_encode(request.args[0])], dtype=np.int64)
            for window in cut(ids, self._length, self._length):
                owners.append(number)
                windows.append(window)
        for number, (own, _) in zip(owners, self._sums(windows), strict=True):
            sums[number] += own
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each text until a stop text, which is left out."""
        questions = [
            _Question(number, str(request.task_name), self.tok_encode(text) or [self.eot_token_id], settings)
            for number, request in enumerate(requests)
            for text, settings in [request.args]
        ]

        def alike(one: _Question) -> str:
            return json.dumps(one.settings, sort_keys=True)

        answers = [""] * len(requests)
        for _, group in groupby(sorted(questions, key=alike), key=alike):
            same = sorted(group, key=lambda one: -len(one.ids))
            for first in range(0, len(same), self._batch_size):
                batch = same[first : first + self._batch_size]
                for one, text in zip(batch, self._continue(batch), strict=True):
                    answers[one.number] = text
        return answers

    def _sums(self, windows: Sequence[Window]) -> list[tuple[float, bool]]:
        """Return each window's log-likelihood, and whether its tokens are the likeliest.

        Both are over the counted tokens, whose log-likelihoods are summed.
        """
        found: dict[int, tuple[float, bool]] = {}
        for batch in batches(windows, self._batch_size):
            losses, likeliest, counted = self._scorer(batch)
            sums = -(losses.double() * counted).sum(-1)
            whole = (likeliest | ~counted).all(-1)
            for window, own, is_greedy in zip(batch, sums.tolist(), whole.tolist(), strict=True):
                found[id(window)] = own, is_greedy
        return [found[id(window)] for window in windows]

    def _continue(self, batch: Sequence[_Question]) -> list[str]:
        settings = batch[0].settings
        stops = stop_texts(settings)
        count = tokens_to_generate(batch[0].task, settings, self._length)
        ids = [one.ids[-(self._length - count) :] for one in batch]
        prompts, lengths = pad_prompts(ids)
        steps = stream(
            self._scorer.gpt,
            prompts.to(self._scorer.device),
            count,
            lengths=lengths,
            eod=self.eot_token_id,
            choose=self._chooser(batch),
            prefill_chunk=self._scorer.chunk,
        )
        with closing(steps):
            return self._until(steps, ids, stops)

    def _until(self, steps: Iterator[torch.Tensor], ids: Sequence[list[int]], stops: Sequence[str]) -> list[str]:
        streams, texts = [TextStream(self._tokenizer, own) for own in ids], [""] * len(ids)
        is_done = [False] * len(ids)
        for tokens in steps:
            for row, token in enumerate(tokens.tolist()):
                if is_done[row]:
                    continue
                is_done[row] = token == self.eot_token_id
                texts[row] += "" if is_done[row] else streams[row].add(token)
                is_done[row] |= any(stop in texts[row] for stop in stops)
            if all(is_done):
                break
        return [_before(text + own.end(), stops) for text, own in zip(texts, streams, strict=True)]

    def _chooser(self, batch: Sequence[_Question]) -> Choose:
        settings = batch[0].settings
        temperature = float(settings.get("temperature") or 0.0)
        if settings.get("do_sample", False) and temperature > 0:
            numbers = [one.number for one in batch]
            top_k, top_p = settings.get("top_k") or None, float(settings.get("top_p") or 1.0)
            return among(Sampler(self._seed, numbers, temperature, top_k, top_p), self._tokenizer.vocab_size)
        return among(greedy, self._tokenizer.vocab_size)


def _before(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text
