"""Makes Hydra compose in less time, since tests compose settings thousands of times."""

import copy
from typing import Any

import omegaconf._utils
import yaml
from hydra._internal.config_repository import CachingConfigRepository, ConfigResult, IConfigRepository


def quicken() -> None:
    """Make compositions share sources and parsed files."""
    _share_sources()
    _parse_once()


def _share_sources() -> None:
    """Share the sources of files, which Hydra would copy with all that is registered."""

    def initialize(self: CachingConfigRepository, delegate: IConfigRepository) -> None:
        self.delegate = copy.copy(delegate)  # `initialize_sources` gives the copy a separate list
        self.cache: dict[str, ConfigResult | None] = {}

    CachingConfigRepository.__init__ = initialize  # type: ignore[method-assign]


def _parse_once() -> None:
    """Parse each text of YAML once: OmegaConf copies what the parser returns."""
    loader, parsed = omegaconf._utils.get_yaml_loader(), {}

    class Loader:
        def __init__(self, stream: Any) -> None:
            self.stream, self.text = stream, stream if isinstance(stream, str) else stream.read()

        def get_single_data(self) -> Any:
            if self.text not in parsed:
                if self.stream is not self.text:
                    self.stream.seek(0)  # errors name the file
                parsed[self.text] = yaml.load(self.stream, Loader=loader)
            return parsed[self.text]

        def dispose(self) -> None:
            pass

    omegaconf._utils.get_yaml_loader = lambda: Loader
