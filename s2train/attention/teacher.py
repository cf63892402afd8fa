"""A frozen dense model from which layers learn what to read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from s2train.attention.dense import DenseKind, DenseSettings
from s2train.attention.hybrid import HybridLayout, dense_layer
from s2train.attention.kind import LayerLayout
from s2train.errors import ConfigError


class TeacherKind(DenseKind):
    """Dense attention that computes what the student's layer learns."""

    core_attention = "s2train.megatron.teacher:TeacherCoreAttention"


@dataclass(frozen=True)
class TeacherSetting:
    """The setting that names the model's teacher.

    Attributes:
        setting: such as layout.kinds.E.teacher.
        value: a run folder or a checkpoint.
    """

    setting: str
    value: str


def teacher_setting(layers: Sequence[LayerLayout]) -> TeacherSetting | None:
    """Return the setting of the layers' teacher; None without one.

    Raises:
        ConfigError: layers name several teachers.
    """
    named = [(kind, kind.teacher) for kind in dict.fromkeys(layer.kind for layer in layers)]
    found = [TeacherSetting(f"{kind.setting}.teacher", path) for kind, path in named if path is not None]
    for other in found[1:]:
        if other.value != found[0].value:
            problem = f"{found[0].setting}={found[0].value} names another one, and a model has one teacher"
            raise ConfigError(other.setting, other.value, problem, f"Set {found[0].value}, or leave one of them out.")
    return found[0] if found else None


def teacher_layout(hybrid: HybridLayout) -> HybridLayout:
    """Make the dense layout of a model's teacher.

    Layers that teach one of the model's have `TeacherKind`.
    """
    teaches = TeacherKind("D", DenseSettings(), "layout.layers")
    layers = []
    for student in hybrid.layers:
        dense = dense_layer(len(student.bound), hybrid.block_size)
        layers.append(dense if student.kind.teacher is None else replace(dense, kind=teaches))
    return replace(hybrid, layers=tuple(layers))
