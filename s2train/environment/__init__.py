"""The machine and the libraries of a run."""
