"""S2 attention: every head reads the blocks of a fixed pattern.

The schedule gives each head the offset of its pattern.
"""

from dataclasses import dataclass, field

from s2train.attention.features import ALL_FEATURES
from s2train.attention.kind import HeadsOf, KindContext, StaticKind
from s2train.config import PatternConfig
from s2train.layouts.patterns import Dense, Pattern
from s2train.layouts.patterns.per_head import NAME as PER_HEAD
from s2train.layouts.patterns.registry import build_patterns


@dataclass(frozen=True)
class S2Settings:
    """The pattern that the schedule shifts from head to head."""

    pattern: PatternConfig = field(default_factory=PatternConfig)


class S2Kind(StaticKind):
    """Letter S, with `layout.pattern`; the letters of `layout.patterns` too."""

    name = "s2"
    settings_type = S2Settings
    core_attention = "s2train.megatron.block_attention:SparseCoreAttention"
    features = ALL_FEATURES

    settings: S2Settings

    @property
    def label(self) -> str:
        return self.name if self.letter == "S" else self.settings.pattern.kind

    @property
    def pattern_setting(self) -> str:
        return f"{self.setting}.pattern" if self.setting.startswith("layout.kinds.") else self.setting

    @property
    def names_heads(self) -> bool:
        return self.settings.pattern.kind == PER_HEAD

    def heads(self) -> HeadsOf:
        build = build_patterns(self.settings.pattern, self.pattern_setting)

        def of_layer(context: KindContext) -> tuple[Pattern, ...]:
            patterns = build(context.layer)
            return tuple(Dense() if head in context.dense_heads else pattern for head, pattern in enumerate(patterns))

        return of_layer
