"""Check the kernels on this GPU: `python -m s2train.kernels.check`.

`python -m s2train.kernels.check.sanitize` runs them under compute-sanitizer.
"""
