"""Seeds that depend only on what they are for.

They stay the same after a resume or with another division of the model.
"""

import hashlib


def stateless_seed(*parts: int | str) -> int:
    """Derive a seed of 63 bits from these parts.

    An example of parts is (run seed, step, layer, global head). The seed is the same in every process.
    """
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
