"""Import a Llama's weights (config.json and .safetensors), or an export, as a checkpoint to start a run from.

python launch/import.py weights=Llama-3.2-1B output=runs/llama
python launch/pretrain.py +model=imported/llama checkpoint.resume=runs/llama …   # the line that the import prints
"""

import _surroundings  # noqa: F401 (prints why the rest can't start)

import hydra
from omegaconf import DictConfig

from s2train import config
from s2train.apex import apex_available
from s2train.command_line import run_command, run_hydra
from s2train.meeting import check_alone

config.register()


def import_weights(composed: DictConfig) -> None:
    """Import, and tell how to start from it."""
    cfg = config.to_object(composed)
    check_alone()
    apex_available()  # Megatron would import an impostor
    from s2train.export.importing import import_llama  # imports Megatron: slow

    checkpoint, files = import_llama(cfg)
    print(f"{checkpoint}: start from it, with the settings of {files.path}, by")
    print(files.command(cfg.output))


@hydra.main(config_path="../conf", config_name="import", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Hydra's entry."""
    run_command(lambda: import_weights(composed))


# Saving starts processes, which import this file again.
if __name__ == "__main__":
    run_hydra(main, config.ImportConfig, __doc__)
