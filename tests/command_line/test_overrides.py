"""Settings are read as typed, or the error shows the required quotes."""

import re

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from s2train.command_line.overrides import quote_where_needed, syntax_problem


def value(argument: str) -> object:
    (again,) = quote_where_needed([argument])
    return OverridesParser.create().parse_override(again).value()


@pytest.mark.parametrize(
    "text",
    [
        "für.txt",
        "/mit leer/ein text.txt",
        "a (1).txt",
        "日本.txt",
        "it's.txt",
        'a"b',
        "~/x",
        "a[1].txt",
        "a=b",
        "C#\\ü\\",
    ],
)
def test_a_text_is_read_unchanged(text: str) -> None:
    assert value(f"input={text}") == text
    assert value(f"+input={text}") == text


def test_texts_of_a_list_are_read_unchanged() -> None:
    assert value("data.path=[0.7,/für (1)/a, 0.3 ,/ein b]") == [0.7, "/für (1)/a", 0.3, "/ein b"]


@pytest.mark.parametrize(
    "argument",
    [
        "input=[a,b]",
        "seed=1,2",
        "optim.lr=tag(log,interval(1e-4,1e-2))",
        "layout.patterns.W={kind:x,window:ü}",
        "input=ü,b",
        "optim.lr=interval(1",
        "input='ü",
        "optim.lr=[1",
        "--cfg=ü",
        "für.txt",
    ],
)
def test_what_hydra_reads_or_what_may_be_meant_otherwise_stays_as_it_is(argument: str) -> None:
    assert quote_where_needed([argument]) == [argument]


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["input=ü,b"], "'input=\"ü,b\"'"),
        (["input=['a',ü]"], '\'input=["…","…"]\''),
        (["input=/mit", "leer/a.txt"], "quote both for the shell: 'input=/mit leer/a.txt'"),
        (["prompt='The'", "queen"], "quote both for the shell: 'prompt=The queen'"),
        (["input=[a.txt,", "b.txt]"], "'input=[a.txt, b.txt]'"),
        (["train.steps"], "Write train.steps=VALUE."),
    ],
)
def test_the_required_quotes_are_shown(arguments: list[str], remedy: str) -> None:
    found = [why for number in range(len(arguments)) if (why := syntax_problem(arguments, number))]
    assert found[0].endswith(remedy)


@settings(max_examples=50)
@given(st.from_regex(re.compile(r"\+{0,2}[a-z_]\w*(\.[a-z_]\w*)*=[\w./+-]+", re.ASCII), fullmatch=True))
def test_hydra_reads_plain_settings_as_typed(argument: str) -> None:
    assert quote_where_needed([argument]) == [argument]
    OverridesParser.create().parse_override(argument)
