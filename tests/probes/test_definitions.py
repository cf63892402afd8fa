import pytest

from s2train.probes.definitions import is_definition, line_span


@pytest.mark.parametrize(
    "line",
    [
        "#define NAME_HERE 3",
        "struct NAME_HERE {",
        "typedef enum NAME_HERE {",
        "static int NAME_HERE(struct inode *inode,",
        "struct page *NAME_HERE(void)",
        "static const int NAME_HERE[3] = {",
        "    def NAME_HERE(self):",
        "pub fn NAME_HERE() {",
        "config NAME_HERE",
    ],
)
def test_a_line_that_defines_a_name_is_found(line: str) -> None:
    text = f"before\n{line}\nafter"
    start = text.index("NAME_HERE")
    assert is_definition(text, start, start + len("NAME_HERE"))


@pytest.mark.parametrize(
    "line",
    [
        "\terror = NAME_HERE(inode);",
        "int NAME_HERE(void);",  # a declaration
        "#define OTHER NAME_HERE",
        "static int other(struct NAME_HERE *one)",
        "/* NAME_HERE is set elsewhere */",
        "#define NAME_HERE_TOO 3",
    ],
)
def test_a_line_that_uses_a_name_is_no_definition(line: str) -> None:
    start = line.index("NAME_HERE")
    assert not is_definition(line, start, start + len("NAME_HERE"))


def test_a_line_goes_from_its_first_character_to_past_its_end() -> None:
    text = "a\nbcd\ne"
    assert line_span(text, 3, 4) == (2, 6)
    assert line_span(text, 6, 7) == (6, 7)
