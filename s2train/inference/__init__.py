"""Inference: KV cache, pages, generation, and their speed."""
