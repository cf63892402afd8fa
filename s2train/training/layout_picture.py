"""Draws the picture of a run's layout beside its steps."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from s2train.attention.features import Feature
from s2train.attention.hybrid import HybridLayout
from s2train.attention.kind import lacking
from s2train.config import PretrainConfig
from s2train.training.metrics import Tracker


class LayoutPicture:
    """Draws a run's layout in a thread, and shows it in wandb.

    Start it after the first step: to import matplotlib and to draw take a second of Python, which a start would wait
    for. As a context, it ends when the picture is drawn.

    Args:
        active: whether this rank draws.

    Attributes:
        path: the picture's file; None if there is none, since data choose what a layer reads.
    """

    def __init__(self, cfg: PretrainConfig, hybrid: HybridLayout, tracker: Tracker, *, active: bool) -> None:
        self._cfg, self._hybrid, self._tracker, self._active = cfg, hybrid, tracker, active
        self.path = None if lacking(hybrid.layers, Feature.PICTURES) else Path(cfg.run_dir) / "layout.png"
        self._pool = ThreadPoolExecutor(1, "layout picture")
        self._drawn: Future[None] | None = None

    def start(self) -> None:
        """Start to draw."""
        if self._active and self.path is not None:
            self._drawn = self._pool.submit(self._draw, self.path)

    def _draw(self, path: Path) -> None:
        from s2train.pictures import draw_layout  # matplotlib: slow

        draw_layout(self._hybrid, self._cfg.train.seq_length, path, title=self._cfg.model.name)
        self._tracker.picture("layout/picture", path)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the picture; raises its error unless there is another one."""
        self._pool.shutdown()
        if self._drawn is not None and error is None:
            self._drawn.result()
