"""Weights of kinds of attention that a checkpoint lacks, or has in another shape, are found from settings alone."""

from pathlib import Path

import pytest

from s2train.checkpoints.kind_weights import InitialWeights, initial_weights
from s2train.config import PretrainConfig
from s2train.errors import ConfigError
from s2train.planning import compose_run

CHECKPOINT = Path("runs/x/checkpoints/iter_0000003")
INDEX, SEA = ("index_query", "index_key"), ("kernel_features", "sharpness", "cnn_first", "cnn_second")


def config(model: str, *settings: str) -> PretrainConfig:
    return compose_run([f"+model=tiny_{model}", *settings])


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        (config("dense"), config("index"), InitialWeights(3, INDEX)),
        (config("dense"), config("moba"), InitialWeights()),
        (config("index"), config("dense"), InitialWeights()),
        (config("index"), config("index"), InitialWeights()),
        (config("index"), config("sea"), InitialWeights(3, SEA)),
        (config("index"), config("index", "layout.layers=EEDE"), InitialWeights(1, INDEX)),
        (
            config("index"),
            config("index", "+layout.kinds.E.mix_mean=true"),
            InitialWeights(3, ("gate_query", "gate_bias")),
        ),
    ],
    ids=["dense, index", "dense, moba", "index, dense", "index", "index, sea", "other layers", "a gate"],
)
def test_weights_that_a_start_from_weights_alone_lacks_keep_initial_values(
    before: PretrainConfig, now: PretrainConfig, found: InitialWeights
) -> None:
    assert initial_weights(before, now, CHECKPOINT, weights_only=True) == found


def test_initial_values_are_named_with_their_layers() -> None:
    assert str(InitialWeights(3, INDEX)) == "initial values of index_query, index_key in 3 layers"
    assert str(InitialWeights(1, ("gate_bias",))) == "initial values of gate_bias in 1 layer"


@pytest.mark.parametrize("layers", ["D", "EEDE"])
def test_a_resumed_run_whose_checkpoint_lacks_a_layers_weights_is_rejected(layers: str) -> None:
    before, now = config("index", f"layout.layers={layers}"), config("index")
    with pytest.raises(ConfigError) as raised:
        initial_weights(before, now, CHECKPOINT, weights_only=False)
    layer = 1 if layers == "D" else 2
    assert str(raised.value) == (
        f"layout.layers=DEEE: {CHECKPOINT} lacks the weight index_query of index block-selection attention in layer "
        f"{layer}. Start from its weights alone (checkpoint.weights_only=true), or use another kind of attention"
    )


@pytest.mark.parametrize(
    ("model", "setting", "value", "shapes"),
    [
        ("index", "index_dim", 32, ("index_query", "4 × 32 × 32", "4 × 32 × 8")),
        ("sea", "features", 32, ("kernel_features", "2 × 32 × 32", "2 × 32 × 8")),
        ("sea", "channels", 16, ("cnn_first", "32 × 4 × 3 × 5", "16 × 4 × 3 × 5")),
    ],
)
def test_a_scorer_of_another_size_is_rejected_and_named(
    model: str, setting: str, value: int, shapes: tuple[str, str, str]
) -> None:
    now = config(model, f"+layout.kinds.E.{setting}=8")
    with pytest.raises(ConfigError) as raised:
        initial_weights(config(model), now, CHECKPOINT, weights_only=True)
    name, before, here = shapes
    assert str(raised.value) == (
        f"layout.kinds.E.{setting}=8: the weight {name} of layer 1 is {before} in {CHECKPOINT}, here {here}. "
        f"Set {value}, as there, or start from a model without this weight"
    )
