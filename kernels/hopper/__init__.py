"""Kernels for Hopper GPUs, in Gluon, and what they walk."""
