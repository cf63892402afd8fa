"""Traces a step of a small model as `run_steps` does; prints the step's parts as JSON. A process of its own."""

import json

from s2train.comparison.short_runs import run_steps
from s2train.megatron import setup
from s2train.planning import compose_run
from tests.program import SMALL


def main() -> None:
    cfg = compose_run([*SMALL, "train.global_batch_size=2"])
    device = setup.initialize(cfg.parallel, cfg.seed)
    setup.connect(cfg.parallel, device)
    print(json.dumps(run_steps(cfg, 1, device, traced=True).parts))
    setup.shutdown()


if __name__ == "__main__":
    main()
