"""Saves, checks, loads and converts checkpoints."""
