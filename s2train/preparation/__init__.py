"""Prepares Megatron indexed datasets from text files."""
