"""Tokenize text files into a Megatron indexed dataset.

python launch/prepare_data.py 'input=[a.txt,b.jsonl]' output=runs/data/mine tokenizer=bytes
"""

import _surroundings  # noqa: F401 (prints why the rest can't start)

import hydra
from omegaconf import DictConfig

from s2train.command_line.program import run_command, run_hydra
from s2train.config import to_object
from s2train.preparation.config import PrepareConfig, register

register()


def prepare_data(settings: PrepareConfig) -> None:
    """Prepare a dataset, and print its summary."""
    from s2train.data.indexed import read_document_lengths
    from s2train.data.tokenizers import load_tokenizer
    from s2train.preparation.prepare import prepare  # imports Megatron: slow
    from s2train.preparation.summary import summary

    made = prepare(settings)
    tokenizer = load_tokenizer(made.tokenizer, "tokenizer", made.end_token)
    print("\n".join(summary(settings.output, made, read_document_lengths(settings.output), tokenizer)))


@hydra.main(version_base="1.3", config_path="../conf", config_name="prepare_data")
def main(cfg: DictConfig) -> None:
    """Run Hydra's main."""
    run_command(lambda: prepare_data(to_object(cfg)))


if __name__ == "__main__":
    run_hydra(main, PrepareConfig, __doc__)
