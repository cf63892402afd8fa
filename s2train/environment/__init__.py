"""Detects the hardware, libraries and versions of a run."""
