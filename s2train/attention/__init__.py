"""Which attention each layer of a model has: kinds, their settings, and what the rest of the program asks of them.

`kind.py` has the interface, one module each of the other files a kind; `registry.py` names them; `hybrid.py` makes the
layers of a model. Nothing here imports Megatron: a kind names its core attention class, which is imported to build it.
"""
