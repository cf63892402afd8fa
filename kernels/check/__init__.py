"""Are the kernels right on this GPU? `python -m s2train.kernels.check`, and `.sanitize` under compute-sanitizer."""
