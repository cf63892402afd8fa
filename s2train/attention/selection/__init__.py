"""Selects key blocks by a score: scorers, causal top-k lists, and targets that scorers learn from.

Plain torch, without Megatron. `scorer.py` has the protocol that scorers share; a file each holds one scorer.
"""
