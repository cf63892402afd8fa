"""Pauses garbage collection from its import on: imports make many objects and no garbage.

It takes a fifth of their time. The program that imports this enables it again when it has imported all.
"""

import gc

gc.disable()
