"""Make a corpus of a source tree, with whole subsystems held out.

python launch/make_corpus.py tree=linux output=runs/data/linux
"""

import _surroundings  # noqa: F401 (prints why the rest can't start)

import hydra
from omegaconf import DictConfig

from s2train.command_line.program import run_command, run_hydra
from s2train.config import to_object
from s2train.preparation.config import CorpusConfig, register

register()


def corpus(settings: CorpusConfig) -> None:
    """Make the corpus, and print what was kept and dropped."""
    from s2train.preparation.source_tree import make_corpus

    made = make_corpus(settings)
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in made.dropped.items()) or "none"
    print(f"{made.files:,} files kept; dropped: {dropped}")
    print(f"train: {_subsystems(made.train_documents)}, {made.train_chars:,} characters")
    held_out = ", ".join(made.held_out[:8]) + (", …" if len(made.held_out) > 8 else "")
    print(f"held out: {_subsystems(made.held_out_documents)}, {made.held_out_chars:,} characters: {held_out}")


def _subsystems(count: int) -> str:
    return f"{count:,} subsystem{'s' if count != 1 else ''}"


@hydra.main(version_base="1.3", config_path="../conf", config_name="make_corpus")
def main(cfg: DictConfig) -> None:
    """Hydra's entry."""
    run_command(lambda: corpus(to_object(cfg)))


if __name__ == "__main__":
    run_hydra(main, CorpusConfig, __doc__)
