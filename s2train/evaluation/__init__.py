"""Measures texts' loss and perplexity, and lm-evaluation-harness tasks."""
