"""RoPE's frequencies for longer sequences in float64, from the papers, one dimension at a time."""

import math

from s2train.rope_scaling import RopeScalingConfig


def frequencies(dim: int, base: float, scaling: RopeScalingConfig) -> list[float]:
    """Radians per token of the `dim / 2` pairs of dimensions that rotate."""
    plain = [math.exp(-2 * pair / dim * math.log(base)) for pair in range(dim // 2)]
    if scaling.kind == "none":
        return plain
    assert scaling.factor is not None
    if scaling.kind == "linear":  # arXiv 2306.15595, equation 4: position m becomes m / factor
        return [frequency / scaling.factor for frequency in plain]
    assert scaling.original_length is not None
    share = _llama3_share if scaling.kind == "llama3" else _yarn_share
    found = []
    for pair, frequency in enumerate(plain):
        kept = share(pair, frequency, dim, base, scaling)
        found.append(kept * frequency + (1 - kept) * frequency / scaling.factor)
    return found


def factor_of_cosines(scaling: RopeScalingConfig) -> float:
    """YaRN, arXiv 2309.00071, equation 22: sqrt(1 / t) = 0.1 ln(s) + 1 scales queries and keys."""
    if scaling.kind != "yarn":
        return 1.0
    assert scaling.factor is not None
    return 0.1 * math.log(scaling.factor) + 1 if scaling.attention_factor is None else scaling.attention_factor


def _turns(frequency: float, length: int) -> float:
    """r(d) = L / wavelength, equation 17 of YaRN."""
    return length * frequency / (2 * math.pi)


def _llama3_share(pair: int, frequency: float, dim: int, base: float, scaling: RopeScalingConfig) -> float:
    """Llama 3.1: by the turns within the original length, linear between low_freq_factor and high_freq_factor."""
    assert scaling.original_length is not None
    low, high = scaling.low_freq_factor or 1.0, scaling.high_freq_factor or 4.0
    turns = _turns(frequency, scaling.original_length)
    return min(max((turns - low) / (high - low), 0.0), 1.0)


def _yarn_share(pair: int, frequency: float, dim: int, base: float, scaling: RopeScalingConfig) -> float:
    """YaRN: all of a frequency of many turns is kept, none of one of few.

    Equation 18 is linear in the turns between them. The authors' code, Megatron and transformers are linear in the
    number of the pair instead, between the pairs that make so many turns, rounded outwards. That is what models are
    trained with, and what this is.
    """
    assert scaling.original_length is not None

    def pair_of(turns: float) -> float:
        """The pair whose frequency makes so many turns: L · base^(-2 pair / dim) / 2π = turns."""
        assert scaling.original_length is not None
        return dim / 2 * math.log(scaling.original_length / (2 * math.pi * turns), base)

    first, last = pair_of(scaling.beta_fast or 32.0), pair_of(scaling.beta_slow or 1.0)
    if scaling.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        return 1.0 if pair <= first else 0.0
    return 1 - min(max((pair - first) / (last - first), 0.0), 1.0)
