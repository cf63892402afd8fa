"""One new token a sequence, over pages of keys and values."""
