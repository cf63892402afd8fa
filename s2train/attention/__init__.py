"""Kinds of attention, their settings, and the layers of a model.

`kind.py` has the interface, which is what the rest of the program asks of a kind. Each kind has one module;
`registry.py` names the kinds; `hybrid.py` makes the layers of a model. Nothing here imports Megatron: a kind names its
core attention class, which is imported to build it.
"""
