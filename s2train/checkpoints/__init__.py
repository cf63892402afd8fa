"""Checkpoints: folders, run state, resuming, conversion."""
