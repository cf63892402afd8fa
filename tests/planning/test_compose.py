"""Folders whose names settings can't hold are rejected."""

from pathlib import Path

import pytest

from s2train.errors import ConfigError
from s2train.planning.compose import check_root


@pytest.mark.parametrize("name", ["a, {b}", "a,b", "a${b}"])
def test_a_root_that_settings_can_not_name_is_rejected(name: str, tmp_path: Path) -> None:
    check_root(tmp_path / "my root")
    with pytest.raises(ConfigError, match="its name has characters that settings can't hold"):
        check_root(tmp_path / name)
