"""docs/megatron-arguments.md names settings that exist, each argument once."""

import re
from functools import cache

import pytest

from s2train.command_line.usage import sections_of, settings_of
from s2train.config import PretrainConfig
from tests.program import ROOT

PAGE = ROOT / "docs" / "megatron-arguments.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.read_text().splitlines()
    if line.startswith("| `--")
]


@cache
def settings(schema: type, prefix: str = "") -> set[str]:
    found = {setting.name for setting in settings_of(schema, prefix)}
    for name, section, _ in sections_of(schema):
        found |= {prefix + name} | settings(section, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_an_argument_has_a_setting_that_exists_or_a_reason(row: list[str]) -> None:
    arguments, named, remark = row
    assert re.fullmatch(r"`--[a-z0-9-]+`(, `--[a-z0-9-]+`)*", arguments)
    names = re.findall(r"`([^`]+)`", named)
    assert set(names) <= settings(PretrainConfig)
    assert names or remark


def test_an_argument_is_listed_once() -> None:
    arguments = re.findall(r"`(--[a-z0-9-]+)`", " ".join(row[0] for row in ROWS))
    assert len(arguments) == len(set(arguments)) > 70
