"""Makes Hydra compose in less time, since tests compose settings thousands of times."""

import copy

from hydra._internal.config_repository import CachingConfigRepository, ConfigResult, IConfigRepository


def share_sources() -> None:
    """Have compositions share the sources of files, which Hydra would copy with all that is registered."""

    def initialize(self: CachingConfigRepository, delegate: IConfigRepository) -> None:
        self.delegate = copy.copy(delegate)  # `initialize_sources` gives the copy a list of its own
        self.cache: dict[str, ConfigResult | None] = {}

    CachingConfigRepository.__init__ = initialize  # type: ignore[method-assign]
