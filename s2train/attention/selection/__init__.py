"""Selects key blocks by a score.

It has scorers, causal top-k lists, and targets that scorers learn from, in plain torch, without Megatron. `scorer.py`
has the protocol that scorers share; each scorer has one file.
"""
