"""Versions of vLLM that serving is tested with."""

TESTED = ("0.24.0",)


def warn_of_version() -> None:
    """Log a warning if this version of vLLM is not tested."""
    import vllm
    from vllm.logger import init_logger

    release = vllm.__version__.split("+")[0]
    if release not in TESTED:
        tested = ", ".join(TESTED)
        init_logger("vllm.s2train").warning("s2train is tested with vLLM %s, and this is %s", tested, release)
