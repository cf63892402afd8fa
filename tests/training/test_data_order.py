"""A resumed run needs the same data in the same proportions, at any path."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from s2train.checkpoints.data_order import check_same_order, data_order
from s2train.errors import ConfigError
from tests.data_fixtures import write_dataset
from tests.test_configs import pretrain

CONTENTS = "the datasets' contents"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder with datasets a and b, whose documents have the same lengths."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write_dataset(Path(name), (name * 60 + "\n") * 400, document_chars=1000)
    return tmp_path


def order(*paths: Any) -> dict[str, Any]:
    return data_order(pretrain("+model=tiny_hybrid", f"data.path=[{','.join(map(str, paths))}]"))


def resumed(before: dict[str, Any], now: dict[str, Any]) -> None:
    check_same_order(before, now, Path("iter_0000003"))


def test_the_same_files_at_another_path_are_accepted(here: Path) -> None:
    resumed(order("a"), order(here / "a"))
    resumed(order(0.3, "a", 0.7, "b"), order(0.3, here / "a", 0.7, here / "b"))
    (here / "moved").mkdir()
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"a{suffix}", here / "moved")
    resumed(order("a"), order("moved/a"))


def test_the_error_for_another_number_of_samples_says_to_leave_it_unset(here: Path) -> None:
    before, now = order("a") | {"data.num_samples": 80}, order("a") | {"data.num_samples": 112}
    with pytest.raises(
        ConfigError, match=r"^data.num_samples=112: .* with 80, .* Leave it unset: .* that train.steps need follow"
    ):
        resumed(before, now)


def test_other_data_of_the_same_size_are_rejected_by_path(here: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^data\.path=b: .* was trained with a, which gives another order of the data"
    ):
        resumed(order("a"), order("b"))


def test_the_same_files_in_another_order_or_other_proportions_are_rejected(here: Path) -> None:
    before = order(0.3, "a", 0.7, "b")
    for now in (order(0.7, "b", 0.3, "a"), order(0.5, "a", 0.5, "b")):
        with pytest.raises(ConfigError, match=r"^data\.path=\[0\..* was trained with \[0\.3,a,0\.7,b\]"):
            resumed(before, now)


def test_other_data_at_the_same_path_are_rejected_as_other_contents(here: Path) -> None:
    before = order("a")
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"b{suffix}", f"a{suffix}")
    with pytest.raises(
        ConfigError,
        match=r"^data\.path=a: .* on other contents of these files\. Restore them, or train in another run_dir",
    ):
        resumed(before, order("a"))


def test_a_dataset_changed_in_place_past_its_beginning_is_rejected(here: Path) -> None:
    before = order("a")
    with open("a.bin", "r+b") as file:
        file.truncate(1 << 23)
        longer = order("a")
        file.seek(7 << 20)
        file.write(b"changed " * (1 << 15))
    assert before != longer
    with pytest.raises(ConfigError, match=r"^data\.path=a: .* on other contents of these files"):
        resumed(longer, order("a"))


def test_fingerprints_of_earlier_checkpoints_are_compared_by_what_they_hold(here: Path) -> None:
    for fields, at_other_paths in ((2, False), (3, True)):  # the first lack the tokens: others could be as long
        old = with_fields(order("a"), fields)
        resumed(old, order("a"))
        if at_other_paths:
            resumed(old, order(here / "a"))
        else:
            with pytest.raises(ConfigError, match=r"^data.path="):
                resumed(old, order(here / "a"))
    with pytest.raises(ConfigError, match=r"^data\.path=b: "):
        resumed(with_fields(order("a"), 3), order("b"))


def with_fields(order: dict[str, Any], count: int) -> dict[str, Any]:
    """An order as in earlier checkpoints, whose fingerprints have fewer fields."""
    return order | {CONTENTS: [", ".join(content.split(", ")[:count]) for content in order[CONTENTS]]}


def test_mock_data_are_accepted() -> None:
    resumed(order("mock"), order("mock"))
