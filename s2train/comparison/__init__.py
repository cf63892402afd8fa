"""Runs side by side: finished ones, backends, step times."""
