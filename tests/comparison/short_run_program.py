"""Traces a step of a small model as `run_steps` does; prints its parts, and what stays, as JSON.

In a separate process, since Megatron's groups and its CPU mode are global.
"""

import gc
import json

import torch

from s2train.comparison.short_runs import run_steps
from s2train.megatron import setup
from s2train.planning import compose_run
from tests.program import SMALL


def main() -> None:
    cfg = compose_run([*SMALL, "train.global_batch_size=2", "train.precision=fp32"])
    device = setup.initialize(cfg.parallel, cfg.seed)
    setup.connect(cfg.parallel, device)
    parts = run_steps(cfg, 1, device, traced=True).parts
    left = sum(isinstance(one, torch.nn.Parameter) for one in gc.get_objects())
    print(json.dumps({"parts": parts, "parameters": left}))
    setup.shutdown()


if __name__ == "__main__":
    main()
