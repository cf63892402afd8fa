"""Gluon kernels for Hopper GPUs, and their schedules."""
