"""Serving in vLLM: an out-of-tree plugin for exports with sparse layers."""
