"""Score needle retrieval of a checkpoint over length x depth.

python launch/needle.py checkpoint=runs/tiny_hybrid
torchrun --nproc-per-node 8 launch/needle.py checkpoint=runs/7b_hybrid tp=2 lengths=[8192,32768] trials=100

Settings: `NeedleConfig` in s2train/config.py. After an interruption, run it again to go on.
"""

import os

import hydra
from omegaconf import DictConfig

from s2train import config
from s2train.command_line import run_command
from s2train.config import NeedleConfig, ParallelConfig
from s2train.errors import ConfigError

config.register()


def evaluate(cfg: NeedleConfig) -> None:
    """Load the checkpoint and evaluate it, on all ranks together."""
    # After Hydra has judged the command line: these imports are slow
    from functools import partial

    from megatron.core import parallel_state

    from s2train.data.needles import NeedleSampler
    from s2train.data.tokenizers import load_tokenizer
    from s2train.evaluation.generate import greedy_decode
    from s2train.evaluation.needle import Ranks, choose_grid
    from s2train.evaluation.results import NeedleResults, output_folder, weights_fingerprint
    from s2train.evaluation.run import run_needles
    from s2train.megatron.setup import initialize, shutdown
    from s2train.training.checkpoint import find_checkpoint, load_for_inference

    find_checkpoint(cfg.checkpoint)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if cfg.tp < 1 or world % cfg.tp:
        remedy = f"Use a divisor of {world}, or start more processes with torchrun --nproc-per-node"
        raise ConfigError("tp", cfg.tp, f"does not divide the {world} processes of this job", remedy)
    device = initialize(ParallelConfig(tp=cfg.tp), cfg.seed)
    loaded = load_for_inference(cfg.checkpoint, device, cfg.tp, cfg.attention_backend)
    trained_length, tokenizer = loaded.config.train.seq_length, load_tokenizer(loaded.config.data.tokenizer)
    sampler = NeedleSampler(tokenizer)
    grid = choose_grid(cfg, trained_length, sampler)
    settings = {
        "weights": weights_fingerprint(loaded.model),
        "tokenizer": tokenizer.fingerprint,
        "haystack": "noise",
        "trials": cfg.trials,
        "seed": cfg.seed,
        "attention_backend": cfg.attention_backend,
    }
    run_needles(
        partial(greedy_decode, loaded.model),
        sampler,
        grid,
        NeedleResults(str(loaded.path), loaded.step, settings, list(grid.lengths), list(grid.depths)),
        output_folder(cfg),
        batch_size=cfg.batch_size,
        device=device,
        trained_length=trained_length,
        ranks=Ranks(
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            parallel_state.get_data_parallel_group(),
        ),
        title=f"Needle retrieval: {loaded.config.model.name}",
    )
    shutdown()


@hydra.main(config_path="../conf", config_name="needle", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Hydra's entry."""
    run_command(cfg, evaluate)


if __name__ == "__main__":
    main()
