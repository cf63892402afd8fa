"""Implementations in a planned run that the plan depends on.

These compute dense attention, SwiGLU, rotation, residual sums and loss.
"""

from dataclasses import dataclass

from s2train.config import PretrainConfig, head_dim
from s2train.environment.dtypes import DTYPES
from s2train.environment.hardware import Hardware
from s2train.environment.liger import ROTATION, SPLIT, SUMS, SWIGLU, choose_loss, liger_operations
from s2train.environment.transformer_engine import uses_te
from s2train.kernels.dense_choice import LONG, LONGEST, takes_fa4


@dataclass(frozen=True)
class Implementations:
    """Implementations by device; the defaults are a CPU's.

    `auto` resolves by the libraries that are installed here.

    Attributes:
        capability: the GPU's compute capability; None: a CPU, or unknown, which is planned without libraries.
        te: layers are transformer-engine's.
    """

    capability: tuple[int, int] | None = None
    te: bool = False

    @classmethod
    def of(cls, cfg: PretrainConfig, hardware: Hardware) -> "Implementations":
        return cls(hardware.capability, uses_te(cfg, hardware))

    def loss(self, cfg: PretrainConfig) -> str:
        """Return what computes the loss, as `choose_loss`."""
        return choose_loss(cfg, self.capability, self.te)

    def fuses_swiglu(self, cfg: PretrainConfig) -> bool:
        """Return whether Liger-Kernel computes SwiGLU, with an in-place backward."""
        return SWIGLU in liger_operations(cfg, self.capability, self.te)

    def fuses_rotation(self, cfg: PretrainConfig) -> bool:
        """Return whether Liger-Kernel computes the rotation, or our split."""
        return ROTATION in liger_operations(cfg, self.capability, self.te)

    def fuses_split(self, cfg: PretrainConfig) -> bool:
        """Return whether queries and keys are rotated while the projection is split.

        Both ways save the same tensors for the backward.
        """
        return SPLIT in liger_operations(cfg, self.capability, self.te)

    def fuses_sums(self, cfg: PretrainConfig) -> bool:
        """Return whether Liger-Kernel computes residual sums with their norms.

        Both ways save the same tensors for the backward.
        """
        return SUMS in liger_operations(cfg, self.capability, self.te)

    def dense(self, cfg: PretrainConfig) -> str:
        """Return the implementation of most dense attention calls.

        See `s2train.kernels.dense_choice`.
        """
        if cfg.dense_attention != "auto":
            return cfg.dense_attention
        model, deterministic = cfg.model, cfg.train.deterministic
        dim, grouped = head_dim(model), model.num_query_groups < model.num_attention_heads
        if takes_fa4(self.capability, DTYPES[cfg.train.precision], dim, grouped=grouped, deterministic=deterministic):
            return "fa4"
        is_measured = cfg.train.seq_length <= LONGEST and (cfg.train.seq_length >= LONG or deterministic)
        if is_measured and self._has_hopper_kernels(cfg):
            return "s2train"
        return "flash" if deterministic else "cudnn"

    def _has_hopper_kernels(self, cfg: PretrainConfig) -> bool:
        return (
            self.capability is not None
            and self.capability[0] == 9
            and cfg.attention_backend in ("auto", "triton")
            and cfg.train.precision == "bf16"
            and cfg.layout.block_size >= 64
            and head_dim(cfg.model) in (64, 128)
        )
