"""Keeps torchrun from leaving folders behind."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_log_folders() -> Iterator[dict[str, str]]:
    """Yield torchrun's environment for log folders that are then removed.

    torchrun leaves a folder /tmp/torchelastic_* for each job. It holds no logs unless they are asked for by --redirects
    or --tee.
    """
    with tempfile.TemporaryDirectory(prefix="s2train_", ignore_cleanup_errors=True) as folder:
        yield {"PET_LOG_DIR": folder}
