"""Checks that a study's corpus was made with given settings."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from s2train.command_line.commands import hydra_settings
from s2train.command_line.composition import CONF, hydra_arguments
from s2train.config import to_object
from s2train.errors import ConfigError, as_typed
from s2train.preparation.config import CorpusConfig, register
from s2train.preparation.source_tree import DESCRIPTION
from s2train.study.files import Folders, read_description

_WITHOUT_EFFECT = ("output", "workers")  # on the texts


def check_made_with(folders: Folders, tree: Path | None, settings: Sequence[str]) -> None:
    """Check that the corpus that is there was made with these settings.

    Settings that are not given may be any.

    Args:
        tree: None: any.
        settings: of launch/make_corpus.py.
    Raises:
        ConfigError: it was made with others, or its description is missing or damaged.
        hydra.errors.HydraException: the settings don't compose.
    """
    remedy = f"Leave it out to keep that corpus; or delete {folders.corpus} and {folders.data}, or set another root"
    path = folders.corpus / DESCRIPTION
    if not path.is_file():
        remedy = f"Delete {folders.corpus}, and make it again with --tree TREE"
        raise ConfigError("root", folders.root, f"{path} is missing", remedy)
    made: dict[str, Any] = {"overwrite": False} | read_description(path)["settings"]
    if tree is not None and "tree" in made and tree.resolve() != Path(made["tree"]).resolve():
        raise ConfigError("--tree", tree, f"{folders.corpus} was made of {made['tree']}", remedy)
    given = asdict(_compose([*hydra_settings({"output": folders.corpus, "tree": str(tree)}), *settings]))
    for name in (setting.partition("=")[0].lstrip("+~") for setting in settings):
        if name not in _WITHOUT_EFFECT and given[name] != made.get(name):
            problem = f"{folders.corpus} was made with {name}={as_typed(made.get(name))}"
            raise ConfigError(name, given[name], problem, remedy)


def _compose(settings: Sequence[str]) -> CorpusConfig:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = to_object(compose("make_corpus", hydra_arguments(settings, CorpusConfig)))
    assert isinstance(composed, CorpusConfig)
    return composed
