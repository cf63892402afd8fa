"""Loss and perplexity of texts, and tasks of lm-evaluation-harness, over the KV cache."""
