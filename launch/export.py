"""Export a checkpoint as Hugging Face safetensors.

Adds a modelling file for sparse layers.

python launch/export.py checkpoint=runs/tiny_hybrid output=exported
"""

import _surroundings  # noqa: F401 (prints why the rest can't start)

import hydra
from omegaconf import DictConfig

from s2train import config
from s2train.checkpoints.hugging_face.config import ExportConfig, register
from s2train.command_line.program import run_command, run_hydra
from s2train.distributed.rendezvous import check_single_process
from s2train.environment.apex import apex_available

register()


def export(composed: DictConfig) -> None:
    """Export a checkpoint, and print the files."""
    cfg = config.to_object(composed)
    check_single_process()
    apex_available()  # rejects another package named apex, which Megatron would import
    from s2train.checkpoints.hugging_face.exporting import export  # imports Megatron: slow
    from s2train.checkpoints.hugging_face.tokenizer_files import adds_tokens

    folder = export(cfg)
    files = ", ".join(sorted(path.name for path in folder.iterdir()))
    print(f"{folder}: {files}")
    if adds_tokens(folder):
        print("training added no special tokens, but this tokenizer does by default: pass add_special_tokens=False")


@hydra.main(config_path="../conf", config_name="export", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Run Hydra's main."""
    run_command(lambda: export(composed))


if __name__ == "__main__":
    run_hydra(main, ExportConfig, __doc__)
