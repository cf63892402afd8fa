"""Folders import one way."""

import ast
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each folder imports from its own and from earlier lines only. Single files of s2train/ stand on one line.
ORDER = [
    {"kernels"},
    {
        "errors",
        "files",
        "config",
        "rope_scaling",
        "batch_sizes",
        "wandb_run",
        "command_line",
        "distributed",
        "environment",
    },
    {"layouts"},
    {"attention"},
    {"costs"},
    {"pictures", "validation"},
    {"data"},
    {"planning"},
    {"megatron"},
    {"checkpoints", "inference"},
    {"serving"},
    {"needles"},
    {"preparation"},
    {"generation", "probes"},
    {"semsa"},
    {"training"},
    {"comparison", "evaluation"},
    {"sweeps", "scaling", "study", "settings_page"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def imported_rooms(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level or "kernels" in path.parts, f"{path}: import by the whole name"
            module = node.module or ""
            names += [f"s2train.{alias.name}" for alias in node.names] if module == "s2train" else [module]
        yield from (name.split(".")[1] for name in names if name.startswith("s2train."))


@pytest.mark.parametrize("room", sorted(LEVEL))
def test_a_room_imports_only_from_rooms_below(room: str) -> None:
    place = ROOT / "kernels" if room == "kernels" else ROOT / "s2train" / room
    paths = place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]
    found = {(str(path.relative_to(ROOT)), other) for path in paths for other in imported_rooms(path)}
    same = ORDER[LEVEL[room]] if LEVEL[room] == 1 else {room}
    allowed = same | {other for other in LEVEL if LEVEL[other] < LEVEL[room]}
    assert {(path, other) for path, other in found if other not in allowed} == set()


def test_every_room_has_a_place_in_the_order() -> None:
    rooms = {
        path.stem for path in (ROOT / "s2train").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert rooms - {"__init__"} | {"kernels"} == LEVEL.keys()


def modules() -> dict[str, Path]:
    """The file of each module of the package."""
    roots = {"s2train": ROOT / "s2train", "s2train.kernels": ROOT / "kernels"}
    return {
        ".".join([name, *path.relative_to(root).with_suffix("").parts]).removesuffix(".__init__"): path
        for name, root in roots.items()
        for path in root.rglob("*.py")
    }


def imported_modules(name: str, path: Path, known: Iterable[str]) -> Iterator[str]:
    """The modules that a file names anywhere, also within functions and for types alone."""
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                found = f"{module}.{alias.name}"
                yield from (one for one in (found if found in known else module,) if one in known)


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = modules()
    imports = {name: set(imported_modules(name, path, known)) - {name} for name, path in known.items()}
    assert len(imports["s2train.kernels.attention"]) > 1
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_kernels_import_neither_megatron_nor_hydra() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {name.split(".")[0] for name in names} & {"megatron", "hydra", "omegaconf"}, path
