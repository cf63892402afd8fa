"""KV cache, page pool, generation, and their timing."""
