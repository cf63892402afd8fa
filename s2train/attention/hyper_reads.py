"""Expected number of keys that HyperAttention reads."""

import numpy as np

from s2train.kernels.hyper.settings import HyperSettings, levels


def expected_reads(settings: HyperSettings, length: int) -> float:
    """Return how many pairs a causal head is expected to read.

    A pair is a query and a key of nonzero weight. A key is read if it is exact, in the query's bucket, or sampled. The
    expectation is over the samples, and over keys that fall into buckets without regard to their position.
    """
    total = 0.0
    queries = np.arange(length)
    own = queries // settings.shortest * settings.shortest  # begin of a query's own interval
    total += float((queries - own + 1).sum())
    nearest = (
        queries // settings.block - settings.window // settings.block
    ) * settings.block  # first key of the window
    for level in levels(settings, length, causal=True):
        missed = (1 - min(1.0, settings.bucket / level.size)) * (1 - min(1.0, settings.samples / level.size))
        for interval in range(level.count):
            start, (first, stop) = level.start(interval), level.readers(interval, length)
            end = start + level.size
            begin_of_window = nearest[first:stop].clip(start, end)
            exact = end - begin_of_window + (min(end, settings.sinks) - start if settings.sinks > start else 0)
            overlap = (np.minimum(end, settings.sinks) - begin_of_window).clip(0)
            exact = exact - overlap
            total += float((exact + (level.size - exact) * (1 - missed)).sum())
    return total
