"""Seeds that depend on what they are for, and on nothing that a resume or another division changes."""

import hashlib


def stateless_seed(*parts: int | str) -> int:
    """A seed of 63 bits for these parts, such as (run seed, step, layer, global head): the same in every process."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
