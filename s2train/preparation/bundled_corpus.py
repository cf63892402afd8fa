"""Prepares the bundled corpus for the runs that name it."""

import os

from filelock import FileLock

from s2train.config import PretrainConfig
from s2train.data.blend import BUNDLED, BUNDLED_PREFIX
from s2train.files import check_writable
from s2train.preparation.config import PrepareConfig
from s2train.preparation.prepare import prepare


def ensure_prepared(cfg: PretrainConfig) -> None:
    """Prepare the bundled corpus, as bytes, if the run needs it.

    Does nothing if all its files exist. Call it on rank 0, before `check_data` and `build_datasets` on any rank.

    Raises:
        ConfigError: on `data.path`; the working directory can't be written.
    """
    path = cfg.data.path
    if path != BUNDLED and not (isinstance(path, list | tuple) and BUNDLED in path):
        return
    folder = os.path.dirname(BUNDLED_PREFIX)
    check_writable("data.path", folder)
    os.makedirs(folder, exist_ok=True)
    with FileLock(f"{BUNDLED_PREFIX}.lock"):  # several runs may start at once
        if not all(os.path.isfile(BUNDLED_PREFIX + suffix) for suffix in (".bin", ".idx", ".json")):
            prepare(PrepareConfig(input=BUNDLED, output=BUNDLED_PREFIX, overwrite=True))
