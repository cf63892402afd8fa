"""`layout=file:PATH` names a layout outside of conf/."""

from pathlib import Path

import pytest

from s2train.errors import ConfigError
from s2train.planning import compose_run

LAYOUT = "layers: S\nblock_size: 16\npattern: {kind: span, base: 2, slope: 0.5}\n"


@pytest.mark.parametrize("folder", ["", "deeper/still"])
def test_a_run_takes_its_layout_from_a_file(tmp_path: Path, folder: str) -> None:
    file = tmp_path / folder / "mine.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(LAYOUT)
    cfg = compose_run(["+model=tiny_hybrid", f"layout=file:{file}", "layout.pattern.sinks=1"])
    found = cfg.layout.pattern
    assert (cfg.layout.layers, cfg.layout.block_size) == ("S", 16)
    assert (found.kind, found.base, found.slope, found.sinks) == ("span", 2, 0.5, 1)


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(LAYOUT)
    compose_run(["+model=tiny_hybrid", f"layout=file:{file}"])
    file.write_text(LAYOUT.replace("base: 2", "base: 3"))
    assert compose_run(["+model=tiny_hybrid", f"layout=file:{file}"]).layout.pattern.base == 3


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "can't be read"), ("a: [", "is no YAML"), ("", "holds no settings")]
)
def test_a_file_without_settings_is_rejected(tmp_path: Path, content: str | None, problem: str) -> None:
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=f"^layout=file:{file}: {problem}"):
        compose_run(["+model=tiny_hybrid", f"layout=file:{file}"])
