"""Checks how a task of lm-evaluation-harness generates text."""

from collections.abc import Mapping
from typing import Any

from s2train.errors import ConfigError

_SUPPORTED = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}
_DEFAULT_TOKENS = 256  # of tasks that set no number, as in the harness


def tokens_to_generate(task: str, settings: Mapping[str, Any], length: int) -> int:
    """Return how many tokens a task generates at most.

    Args:
        settings: its `generation_kwargs`.
        length: tokens that the model sees at once.
    Raises:
        ConfigError: a setting is not supported, a stop text is empty, or no token is left for the question.
    """
    if unknown := settings.keys() - _SUPPORTED:
        problem = f"the task generates with {', '.join(sorted(unknown))}, which is not supported"
        raise ConfigError("tasks", task, problem, f"Choose tasks that use {', '.join(sorted(_SUPPORTED))} alone")
    if "" in stop_texts(settings):
        # The harness's Hugging Face model finds it in every text, and so answers with one token.
        problem = "the task stops at an empty text, which ends every answer after its first token"
        raise ConfigError("tasks", task, problem, "Leave it out of the task's until: the end token ends answers too")
    count = int(settings.get("max_gen_toks") or _DEFAULT_TOKENS)
    if count >= length:
        problem = f"the task {task} generates up to {count} tokens, which leaves none for its question"
        raise ConfigError("length", length, problem, f"Set more than {count}")
    return count


def stop_texts(settings: Mapping[str, Any]) -> list[str]:
    """List the texts before which an answer ends."""
    until = settings.get("until")
    return [until] if isinstance(until, str) else list(until or [])
