"""Text generation from a checkpoint: request, streaming to a terminal, and results."""
