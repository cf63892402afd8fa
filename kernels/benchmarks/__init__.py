"""Benchmarks of the kernels and their peers.

All run in one process on the same inputs.
"""
