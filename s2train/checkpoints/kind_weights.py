"""Compares weights of kinds of attention with a checkpoint's, by settings."""

from dataclasses import dataclass, fields
from pathlib import Path

from s2train.attention.hybrid import parse_layers
from s2train.attention.kind import AttentionKind
from s2train.attention.registry import kinds_of
from s2train.config import PretrainConfig
from s2train.costs.parameters import attention_shape
from s2train.errors import ConfigError, as_typed


@dataclass(frozen=True)
class InitialWeights:
    """Weights that a checkpoint lacks, so that they keep their initial values.

    Attributes:
        layers: how many layers have some.
        names: of the weights, in order of appearance.
    """

    layers: int = 0
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        layers = f"{self.layers} layer{'s' * (self.layers != 1)}"
        return f"initial values of {', '.join(self.names)} in {layers}"


def initial_weights(
    before: PretrainConfig, now: PretrainConfig, checkpoint: Path, weights_only: bool
) -> InitialWeights:
    """List the weights of kinds of attention that the checkpoint lacks.

    Args:
        before: settings of the run that wrote the checkpoint, with the same `model`.
        weights_only: only weights are loaded; else a missing weight is an error, since its optimizer state is missing
            too.
    Raises:
        ConfigError: a weight has another shape in the checkpoint, or is missing and may not be.
    """
    shape, layers, names = attention_shape(now.model), 0, dict[str, None]()
    kinds = _kinds(now)
    if not any(kind.weights(shape) for kind in kinds):
        return InitialWeights()
    for number, (kind, old) in enumerate(zip(kinds, _kinds(before), strict=True)):
        saved = {weight.name: weight.shape for weight in old.weights(shape)}
        missing = []
        for weight in kind.weights(shape):
            if weight.name not in saved:
                missing.append(weight.name)
                if not (weights_only and weight.may_be_missing):
                    raise _missing(kind, weight.name, number, now, checkpoint, weights_only)
            elif saved[weight.name] != weight.shape:
                sizes = [" × ".join(map(str, one)) for one in (saved[weight.name], weight.shape)]
                problem = f"the weight {weight.name} of layer {number} is {sizes[0]} in {checkpoint}, here {sizes[1]}"
                raise _other_shape(kind, old, problem, now)
        layers += bool(missing)
        names |= dict.fromkeys(missing)
    return InitialWeights(layers, tuple(names))


def _kinds(cfg: PretrainConfig) -> list[AttentionKind]:
    kinds = kinds_of(cfg.layout)
    return [kinds[letter] for letter in parse_layers(cfg.layout.layers, cfg.model.num_layers, kinds)]


def _missing(
    kind: AttentionKind, name: str, layer: int, cfg: PretrainConfig, checkpoint: Path, weights_only: bool
) -> ConfigError:
    problem = f"{checkpoint} lacks the weight {name} of {kind.label} attention in layer {layer}"
    start = "Resume from a model with such layers" if weights_only else "Start from its weights alone"
    remedy = f"{start}{'' if weights_only else ' (checkpoint.weights_only=true)'}, or use another kind of attention"
    return ConfigError("layout.layers", cfg.layout.layers, problem, remedy)


def _other_shape(kind: AttentionKind, old: AttentionKind, problem: str, cfg: PretrainConfig) -> ConfigError:
    if type(kind) is type(old):
        for field in fields(kind.settings):
            value = getattr(old.settings, field.name)
            if field.name not in kind.may_change and value != getattr(kind.settings, field.name):
                return kind.error(
                    field.name, problem, f"Set {as_typed(value)}, as there, or start from a model without this weight"
                )
    remedy = "Use the kind of attention that is there, or start from a model without this weight"
    return ConfigError("layout.layers", cfg.layout.layers, problem, remedy)
