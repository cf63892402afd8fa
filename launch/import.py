"""Import a Llama, a Qwen3 or an export as a checkpoint.

python launch/import.py weights=Llama-3.2-1B output=runs/llama

A run can start from the checkpoint. Prints the commands to prepare data with its tokenizer and to train it.
"""

import _surroundings  # noqa: F401 (prints why the rest can't start)

import hydra
from omegaconf import DictConfig

from s2train import config
from s2train.checkpoints.hugging_face.config import ImportConfig, register
from s2train.command_line.program import run_command, run_hydra
from s2train.distributed.rendezvous import check_single_process
from s2train.environment.apex import apex_available

register()


def import_weights(composed: DictConfig) -> None:
    """Import weights, and print the commands to train them."""
    cfg = config.to_object(composed)
    check_single_process()
    apex_available()  # rejects another package named apex, which Megatron would import
    from s2train.checkpoints.hugging_face.importing import import_llama  # imports Megatron: slow

    checkpoint, files = import_llama(cfg)
    print(f"{checkpoint}; settings: {files.path}")
    if files.data_command is not None:
        print(f"Prepare data with its tokenizer (input: your own files), then train:\n{files.data_command}")
    else:
        print("Train:")
    print(files.command(cfg.output))


@hydra.main(config_path="../conf", config_name="import", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Run Hydra's main."""
    run_command(lambda: import_weights(composed))


# Saving starts processes, which import this file again.
if __name__ == "__main__":
    run_hydra(main, ImportConfig, __doc__)
