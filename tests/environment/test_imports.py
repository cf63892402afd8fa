"""Imports are quick, leave out what they should, and are counted."""

import gc
import importlib
import py_compile
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from s2train.environment.imports import Modules, imported_modules, left_out, no_collection, thaw


def test_modules_left_out_cannot_be_imported_until_the_end() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "wave"]:
        del sys.modules[name]
    with left_out("wave", "json"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("wave")
        importlib.import_module("json")  # already imported
    importlib.import_module("wave")


@pytest.mark.parametrize("is_enabled", [True, False])
def test_collection_is_paused_and_left_as_it_was(is_enabled: bool) -> None:
    was_enabled = gc.isenabled()
    try:
        (gc.enable if is_enabled else gc.disable)()
        with no_collection():
            assert not gc.isenabled()
        assert gc.isenabled() == is_enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()


@pytest.mark.parametrize(("release", "expected"), [("3.8.1", 0), ("3.9.0", 1), ("3.10.0", 1), (None, 0)])
def test_what_is_exempt_from_collection_is_freed_at_exit_where_triton_would_list_it(
    release: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfrozen: list[None] = []
    monkeypatch.setattr(gc, "unfreeze", lambda: unfrozen.append(None))
    if release is None:
        monkeypatch.delitem(sys.modules, "triton", raising=False)
    else:
        monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=release))
    thaw()
    assert len(unfrozen) == expected


def test_modules_without_byte_code_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "plain_module.py"
    source.touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = imported_modules()
    monkeypatch.setitem(sys.modules, "plain_module", importlib.import_module("plain_module"))
    assert imported_modules() == Modules(before.modules + 1, before.without_byte_code + 1)
    py_compile.compile(str(source))
    assert imported_modules() == Modules(before.modules + 1, before.without_byte_code)


def test_missing_byte_code_is_mentioned_from_a_tenth_of_the_modules_on() -> None:
    assert Modules(1000, 99).advice() is None
    assert (advice := Modules(1000, 100).advice()) is not None
    assert advice.startswith("100 of 1,000 modules have no byte code")
