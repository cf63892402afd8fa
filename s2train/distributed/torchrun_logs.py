"""Keeps torchrun from leaving folders behind."""

import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_log_folders(given: Namespace | None = None) -> Iterator[list[str]]:
    """Yield torchrun's option for log folders that are then removed.

    torchrun leaves a folder /tmp/torchelastic_* for each job. It is empty unless --redirects or --tee asks for logs. If
    `given` asks for logs or names a folder, no option is yielded, and nothing is removed.

    Args:
        given: torchrun's settings, by `parse_args` from options and PET_* variables; None: the defaults.
    """
    if given is not None and (given.log_dir is not None or (given.redirects, given.tee) != ("0", "0")):
        yield []
        return
    with tempfile.TemporaryDirectory(prefix="s2train_", ignore_cleanup_errors=True) as folder:
        # an option, not PET_LOG_DIR: jobs that a rank starts would inherit that, and lose their logs
        yield ["--log-dir", folder]
