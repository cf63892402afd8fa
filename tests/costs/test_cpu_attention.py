"""A plan's memory on a CPU is near what was measured."""

import pytest

from s2train.environment.hardware import Hardware
from s2train.planning import compose_run, preview

CPU = Hardware("CPU", "cpu", 24 << 30)
ONE = ("train.micro_batch_size=1", "train.global_batch_size=1")
TWO = ("train.micro_batch_size=2", "train.global_batch_size=2")


# Largest resident size of launch/pretrain.py for one step of +model=tiny_KIND, in KB, by GNU time: 2026-11-30, torch
# 2.13 on two cores. Each is 4 heads, and 1 to 4 layers whose memory grows with the square of the length.
@pytest.mark.parametrize(
    ("kind", "layers", "length", "settings", "measured"),
    [
        ("hybrid", "D", 8192, ONE, 1_025_320),
        ("hybrid", "S", 4096, ONE, 1_847_752),
        ("hybrid", "S", 8192, ONE, 5_625_400),
        ("hybrid", "DSSS", 4096, (*ONE, "train.precision=bf16"), 1_090_144),
        ("hybrid", "DSSS", 4096, (*ONE, "train.recompute=full"), 974_256),
        ("hybrid", "DSSS", 4096, TWO, 1_808_516),
        ("moba", "DEEE", 8192, ONE, 4_538_116),
        ("moba", "DEEE", 4096, TWO, 2_719_836),
        ("index", "DDDE", 4096, ONE, 2_368_752),
        ("index", "DEEE", 8192, ONE, 12_305_508),
        ("index", "DEEE", 4096, (*ONE, "train.recompute=full"), 2_237_652),
        ("sea", "DEEE", 8192, ONE, 12_875_308),
        ("hyper", "DDDH", 4096, ONE, 2_250_300),
        ("hyper", "DHHH", 8192, ONE, 8_247_792),
        ("hyper", "DHHH", 4096, (*ONE, "train.precision=bf16"), 2_743_340),
    ],
)
def test_a_plan_is_near_the_measured_memory(
    kind: str, layers: str, length: int, settings: tuple[str, ...], measured: int
) -> None:
    cfg = compose_run([f"+model=tiny_{kind}", f"layout.layers={layers}", f"train.seq_length={length}", *settings])
    assert 0.95 <= preview(cfg, 1, CPU).memory.total / (measured << 10) <= 1.15
