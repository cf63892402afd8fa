"""A task that generates text in an unsupported way is rejected; the harness itself is not needed."""

import pytest

from s2train.errors import ConfigError
from s2train.evaluation.generation_settings import tokens_to_generate


def test_the_number_of_tokens_is_the_tasks_or_the_harness_default() -> None:
    assert tokens_to_generate("own", {"until": ["."], "max_gen_toks": 5}, 64) == 5
    assert tokens_to_generate("own", {"do_sample": False}, 1024) == 256


def test_an_unknown_setting_is_rejected_by_name() -> None:
    with pytest.raises(ConfigError, match=r"^tasks=own: the task generates with num_beams"):
        tokens_to_generate("own", {"num_beams": 4, "until": ["."]}, 1024)


def test_a_question_needs_a_token() -> None:
    with pytest.raises(ConfigError, match=r"^length=256: the task own generates up to 256 tokens"):
        tokens_to_generate("own", {}, 256)
