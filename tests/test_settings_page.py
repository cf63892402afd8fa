"""docs/settings.md holds every setting with its default and comment."""

import re

from s2train import settings_page
from tests.program import ROOT


def test_the_page_is_what_the_dataclasses_say() -> None:
    assert settings_page.PAGE.read_text() == settings_page.page(), (
        "docs/settings.md is out of date: run python -m s2train.settings_page"
    )


def test_every_program_with_settings_is_on_it() -> None:
    with_settings = {
        f"launch/{path.name}" for path in (ROOT / "launch").glob("*.py") if "run_hydra(main" in path.read_text()
    }
    assert with_settings == settings_page.programs().keys()


def test_sections_within_sections_are_on_it() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \|", settings_page.page(), re.M)
    assert {"train.steps", "layout.pattern.stride", "needles.facts", "hydra.launcher.nodes"} <= set(rows)


def test_what_markdown_would_take_as_markup_is_escaped() -> None:
    rows = [line for line in settings_page.page().splitlines() if line.startswith("| `")]
    assert any(r"\<\|endoftext\|\>" in row for row in rows)
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) == 5  # four cells
        text = re.sub(r"`[^`]*`", "", row)
        assert not re.search(r"(?<!\\)[*<>]", text)
