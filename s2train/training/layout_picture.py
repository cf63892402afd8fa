"""Draws the picture of a run's layout beside its steps."""

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from s2train.attention.features import Feature
from s2train.attention.hybrid import HybridLayout
from s2train.attention.kind import lacking
from s2train.config import PretrainConfig
from s2train.errors import ConfigError
from s2train.training.metrics import Tracker


class LayoutPicture:
    """Draws a run's layout in a thread, and shows it in wandb.

    Start it after the first step: to import matplotlib and to draw take a second of Python, which a start would wait
    for. As a context, it ends when the picture is drawn. A picture that can't be drawn is logged, and stops no run.

    Args:
        active: whether this rank draws.

    Attributes:
        path: the picture's file; None until it is drawn, and if there is none, since data choose what a layer reads.
    """

    def __init__(self, cfg: PretrainConfig, hybrid: HybridLayout, tracker: Tracker, *, active: bool) -> None:
        self._cfg, self._hybrid, self._tracker = cfg, hybrid, tracker
        self._active = active and not lacking(hybrid.layers, Feature.PICTURES)
        self._pool = ThreadPoolExecutor(1, "layout picture")
        self.path: Path | None = None

    def start(self) -> None:
        """Start to draw."""
        if self._active:
            self._pool.submit(self._draw, Path(self._cfg.run_dir) / "layout.png")

    def _draw(self, path: Path) -> None:
        try:
            from s2train.pictures import draw_layout  # matplotlib: slow

            draw_layout(self._hybrid, self._cfg.train.seq_length, path, title=self._cfg.model.name)
        except Exception as error:  # a broken matplotlib, a full disk: the run's steps need no picture
            line = (str(error).strip().splitlines() or [""])[0]
            self._tracker.note(f"the layout's picture can't be drawn: {type(error).__name__}: {line}; continuing")
            return
        self.path = path
        self._tracker.picture("layout/picture", path)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the picture."""
        self._pool.shutdown()


def check_matplotlib() -> None:
    """Check that a run's pictures can be drawn, without importing matplotlib.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        problem = "the pictures of a run's layout and losses need it"
        raise ConfigError("matplotlib", "(not installed)", problem, "Install it: pip install matplotlib")
