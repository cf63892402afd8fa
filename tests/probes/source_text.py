"""Source text in which every function is defined once and called once, far behind."""

import random

CONSONANTS = "bcdfghjklmnpqrstvwxz"


def name(rng: random.Random) -> str:
    return "".join(rng.choices(CONSONANTS, k=12))


def source(seed: int, functions: int, behind: int) -> str:
    """Definitions, each followed by a call of the function `behind` definitions before."""
    rng = random.Random(seed)
    names = [name(rng) for _ in range(functions)]
    lines = []
    for index, own in enumerate(names):
        lines.append(f"static int {own}(void)")
        called = f"{names[index - behind]}()" if index >= behind else "0"
        lines.append(f"{{\n\treturn {called};\n}}\n")
    return "\n".join(lines)
