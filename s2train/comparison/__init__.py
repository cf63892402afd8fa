"""Compares runs: finished ones, backends, step times."""
