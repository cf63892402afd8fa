"""A Llama whose heads each keep their own blocks of keys.

Its attention is a sparse/dense hybrid, which `config.json` lays out. This file stands alone: it needs torch, and
safetensors to load weights. Without transformers:

    model = S2ForCausalLM.from_folder(".")
    logits = model(input_ids).logits
    tokens = model.greedy(input_ids, 20)

With transformers 4.48 to 5.24: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.

On a GPU where s2train is installed, attention runs by its kernels, which skip the blocks that a head drops. Elsewhere
torch computes it with masks and skips nothing. `set_attention` chooses one of them. Documents start at position 0, or
after padding on the left: then pass the attention mask.
"""

import base64
import json
import math
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast as Output

    _CACHE = "cache" if "cache" in {field.name for field in fields(Output)} else "past_key_values"
except ImportError:
    PretrainedConfig, GenerationMixin, Output = object, object, SimpleNamespace
    PreTrainedModel, DynamicCache, _CACHE = nn.Module, None, "past_key_values"

try:
    from s2train.kernels import BlockLayout, block_sparse_attention
except ImportError:
    BlockLayout = block_sparse_attention = None  # type: ignore[assignment, misc]

_ROWS = 256  # queries that attend at once, which bounds the masks' memory


class S2Config(PretrainedConfig):
    """The settings of `config.json`: those of a Llama, and `layout`."""

    model_type = "s2_llama"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        partial_rotary_factor: float = 1.0,
        max_position_embeddings: int = 2048,
        tie_word_embeddings: bool = False,
        layout: dict | None = None,
        rope_scaling: dict | None = None,
        rope_parameters: dict | None = None,
        qk_norm: bool = False,
        **other: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.rms_norm_eps, self.rope_theta = rms_norm_eps, rope_theta
        self.partial_rotary_factor, self.qk_norm = partial_rotary_factor, qk_norm
        self.max_position_embeddings = max_position_embeddings
        self.tie_word_embeddings = tie_word_embeddings
        if scaling := rope_parameters or rope_scaling:  # by the name that transformers 5 saves
            self.rope_parameters = scaling
        dense = [[0] * num_attention_heads] * num_hidden_layers
        if layout is None and "S2ForCausalLM" not in (other.get("architectures") or []):
            layout = {"block_size": 64, "patterns": [{"kind": "dense"}], "layers": dense}
        self.layout: Any = layout  # checked when a model is made
        if PretrainedConfig is object:
            self.name_or_path = other.get("name_or_path", "")
        else:
            super().__init__(tie_word_embeddings=tie_word_embeddings, **other)


_KINDS: dict[str, tuple[str, ...]] = {  # of patterns, and their entries
    "dense": (),
    "local_vertical": ("local", "stride", "offset", "sinks"),
    "sliding_window": ("window", "sinks"),
    "global_blocks": ("local", "blocks"),
    "dilated": ("local", "dilation", "offset", "window"),
    "span": ("base", "slope", "sinks"),
    "ranges": ("ranges", "offset", "sinks"),
    "mask": ("num_blocks", "bits"),
}


def check_layout(layout: Any, layers: int | None, heads: int) -> None:
    """Check the entry `layout` of config.json before anything reads it.

    layers: how many it should have, if known; heads: query heads of a layer. Raises ValueError, which names the entry.
    """
    _require(isinstance(layout, dict), "layout", layout, "settings by name")
    _require(layout.get("format", 1) == 1, "layout.format", layout.get("format"), "1, which this version reads")
    size, patterns, rows = (layout.get(name) for name in ("block_size", "patterns", "layers"))
    _require(_is_count(size, 1), "layout.block_size", size, "a number of tokens")
    _require(isinstance(patterns, list), "layout.patterns", patterns, "a list")
    for number, pattern in enumerate(patterns):
        name = f"layout.patterns[{number}]"
        kind: Any = pattern.get("kind") if isinstance(pattern, dict) else None
        _require(isinstance(kind, str) and kind in _KINDS, f"{name}.kind", kind, f"one of {', '.join(_KINDS)}")
        if wrong := set(pattern) ^ {"kind", *_KINDS[kind]}:
            raise ValueError(f"{name} {'has' if min(wrong) in pattern else 'lacks'} {min(wrong)}, as no {kind} pattern")
        for entry in _KINDS[kind]:
            right = _is_right(entry, pattern[entry], pattern)
            _require(right, f"{name}.{entry}", pattern[entry], f"a value of a {kind} pattern")
    right = isinstance(rows, list) and layers in (None, len(rows))
    _require(right, "layout.layers", rows, "a list" if layers is None else f"a list of {layers} layers")
    for number, row in enumerate(rows):
        right = isinstance(row, list) and len(row) == heads and all(map(_is_count, row)) and max(row) < len(patterns)
        _require(right, f"layout.layers[{number}]", row, f"the numbers of {heads} heads' patterns")


def _is_right(entry: str, value: Any, pattern: dict) -> bool:
    if entry == "blocks":
        return isinstance(value, list) and all(map(_is_count, value))
    if entry == "slope":
        return type(value) in (int, float) and 0 <= value < 1
    if entry == "ranges":  # (limit, stride): the limits ascend, and the last is null
        if not isinstance(value, list) or not all(isinstance(part, list) and len(part) == 2 for part in value):
            return False
        *limits, last = [0, *(limit for limit, _ in value)]
        right = last is None and all(map(_is_count, limits)) and limits == sorted(set(limits))
        return right and all(_is_count(stride, 1) for _, stride in value)
    if entry == "bits":
        try:
            rows = pattern["num_blocks"]
            return len(base64.b64decode(value, validate=True)) == rows * -(-rows // 8)
        except (TypeError, ValueError):
            return False
    if value is None:
        return entry == "window" and pattern["kind"] == "dilated"
    return _is_count(value, entry not in ("offset", "sinks"))


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 1 << 62


def _require(right: bool, name: str, found: Any, wanted: str) -> None:
    if not right:
        shown = "null or missing" if found is None else json.dumps(found)[:60]
        raise ValueError(f"{name} is {shown}, not {wanted}")


def keeps(pattern: dict, query: Tensor, key: Tensor) -> Tensor:
    """Return whether a head keeps (query block, key block).

    Indices are int64; the result is bool, of the shape that they broadcast to. A pattern is causal in blocks; causality
    between tokens is added to it.
    """
    distance = query - key
    kind = pattern["kind"]
    if kind == "dense":
        kept = distance >= 0
    elif kind == "local_vertical":
        column = ((key - pattern["offset"]) % pattern["stride"] == 0) | (key < pattern["sinks"])
        kept = (distance < pattern["local"]) | column
    elif kind == "sliding_window":
        kept = (distance < pattern["window"]) | (key < pattern["sinks"])
    elif kind == "global_blocks":
        blocks = torch.tensor(pattern["blocks"], device=key.device, dtype=key.dtype)
        kept = (distance < pattern["local"]) | torch.isin(key, blocks)
    elif kind == "dilated":
        far = (distance - pattern["offset"]) % pattern["dilation"] == 0
        if pattern["window"] is not None:
            far = far & (distance < pattern["window"])
        kept = (distance < pattern["local"]) | far
    elif kind == "span":  # a window that grows with the query's position
        window = pattern["base"] + ((query + 1).double() * pattern["slope"]).floor().long()
        kept = (distance < window) | (key < pattern["sinks"])
    elif kind == "ranges":  # (limit, stride), nearest first
        kept, start = distance == 0, 0
        for limit, stride in pattern["ranges"]:
            column = ((key - pattern["offset"]) % stride == 0) | (key < pattern["sinks"])
            kept = kept | ((distance >= start) & (column if limit is None else column & (distance < limit)))
            start = limit
    else:  # mask: a row is packed into bytes, key block j in bit j % 8 of byte j // 8
        size = pattern["num_blocks"]
        if int(query.max()) >= size:
            raise ValueError(f"the layout's masks end at {size} blocks: shorten the sequence")
        bits = torch.frombuffer(bytearray(base64.b64decode(pattern["bits"])), dtype=torch.uint8).view(size, -1)
        kept = (bits.to(key.device)[query, key >> 3] >> (key & 7).to(torch.uint8)) & 1 == 1
    return kept & (distance >= 0)


def token_mask(patterns: list, heads: list, block_size: int, first: int, stop: int, device: torch.device) -> Tensor:
    """Return which keys the queries of every head see.

    Queries are first … stop - 1, keys 0 … stop - 1; the result is bool [heads, stop - first, stop].
    """
    query, key = torch.arange(first, stop, device=device), torch.arange(stop, device=device)
    blocks = torch.arange((stop - 1) // block_size + 1, device=device)
    rows = blocks[first // block_size :]
    names = sorted(set(heads))
    kept = torch.stack([keeps(patterns[name], rows[:, None], blocks[None, :]) for name in names])
    kept = kept[:, query // block_size - first // block_size][:, :, key // block_size]
    kept = kept & (query[:, None] >= key[None, :])
    return kept[[names.index(head) for head in heads]]


class Kernels:
    """Whether s2train's kernels compute attention, and the layouts that they read.

    Attributes:
        choice: "auto", "kernels" or "masks"; see `set_attention`.
    """

    def __init__(self, config: S2Config) -> None:
        self.choice = "auto"
        self._config = config
        self._layouts: dict[Any, Any] = {}

    def runs_on(self, device: torch.device) -> bool:
        if self.choice == "auto":
            return BlockLayout is not None and device.type == "cuda"
        return self.choice == "kernels"

    def layout(self, layer: int, length: int, device: torch.device) -> Any:
        """Return the kernels' layout of a layer's heads.

        It covers `length` tokens or more. Layers with equal heads share one layout.
        """
        layout = self._config.layout
        heads, size = layout["layers"][layer], layout["block_size"]
        names = sorted(set(heads))
        patterns = [layout["patterns"][name] for name in names]
        needed = -(-length // size)
        most = min((pattern["num_blocks"] for pattern in patterns if pattern["kind"] == "mask"), default=1 << 62)
        if needed > most:
            raise ValueError(f"the layout's masks end at {most} blocks: shorten the sequence")
        key = (tuple(heads), device)
        if key not in self._layouts or self._layouts[key].num_query_blocks < needed:
            blocks = min(1 << (needed - 1).bit_length(), most)
            rules = [partial(keeps, pattern) for pattern in patterns]
            of_heads = [names.index(head) for head in heads]
            self._layouts[key] = BlockLayout.from_rule(rules, of_heads, size, blocks, blocks, device=device)
        return self._layouts[key]


class Cache:
    """Keys and values of all layers so far, as in transformers' DynamicCache."""

    def __init__(self) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []

    def get_seq_length(self) -> int:
        return self._layers[0][0].shape[2] if self._layers else 0

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        if layer == len(self._layers):
            self._layers.append((key, value))
        else:
            old = self._layers[layer]
            self._layers[layer] = (torch.cat([old[0], key], 2), torch.cat([old[1], value], 2))
        return self._layers[layer]


class RMSNorm(nn.RMSNorm):
    """x / rms(x) · weight."""


class Embedding(nn.Embedding):
    """Vectors of tokens, and logits by the same, tied weights."""

    def forward(self, given: Tensor, gives_logits: bool = False) -> Tensor:
        # In this module's forward, where accelerate brings its weights and inputs to one device.
        return F.linear(given, self.weight) if gives_logits else super().forward(given)


class Attention(nn.Module):
    """Grouped-query attention over the blocks that each head keeps."""

    def __init__(self, config: S2Config, layer: int, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.layer, self.kernels = config, layer, kernels
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Any, padding: list[int] | None) -> Tensor:
        """Compute attention of new tokens, after those of the cache.

        x: [b, s, hidden]; cos, sin: [s or b, 1, s, dimensions that turn]; padding: on the left, of each sequence.
        """
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        if cache is not None:
            whole = cache.get_seq_length() + k.shape[2] if self.layer == 0 else None
            k, v = cache.update(k, v, self.layer)
            if whole is not None and k.shape[2] != whole:
                problem = f"gives {k.shape[2]} keys back where {whole} are known"
                raise ValueError(f"{type(cache).__name__} {problem}: use a cache that grows, such as DynamicCache")
        return self.o_proj(self.attend_padded(q, k, v, padding).transpose(1, 2).flatten(2))

    def attend_padded(self, q: Tensor, k: Tensor, v: Tensor, padding: list[int] | None) -> Tensor:
        """Compute attention, as `attend`, of sequences that begin after their padding.

        Rows of the padding are 0.
        """
        if padding is None:
            return self.attend(q, k, v)
        out, before = torch.zeros_like(q), k.shape[2] - q.shape[2]
        for pad in set(padding):
            of_pad = [number for number, other in enumerate(padding) if other == pad]
            first = max(pad - before, 0)
            if first < q.shape[2]:
                out[of_pad, :, first:] = self.attend(q[of_pad, :, first:], k[of_pad, :, pad:], v[of_pad, :, pad:])
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Compute attention of queries at the end of the keys.

        q: [b, heads, s_q, d]; k, v: [b, KV heads, s_k, d].
        """
        layout, device, size = self.config.layout, q.device, k.shape[2]
        heads, patterns = layout["layers"][self.layer], layout["patterns"]
        before, grouped = size - q.shape[2], k.shape[1] != q.shape[1]
        if before == 0 and all(patterns[head]["kind"] == "dense" for head in heads):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        if self.kernels.runs_on(device):
            kept = self.kernels.layout(self.layer, size, device)
            return block_sparse_attention(q, k, v, kept, query_offset=before, format="bhsd")
        parts = []
        for first in range(0, q.shape[2], _ROWS):
            rows = q[:, :, first : first + _ROWS]
            stop = before + first + rows.shape[2]
            mask = token_mask(patterns, heads, layout["block_size"], before + first, stop, device)
            parts.append(
                F.scaled_dot_product_attention(
                    rows, k[:, :, :stop], v[:, :, :stop], attn_mask=mask[None], enable_gqa=grouped
                )
            )
        return torch.cat(parts, dim=2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary position embedding to x's first r dimensions.

    Dimension i turns with i + r / 2. x: [b, heads, s, d]; cos, sin: [s, r], or [b, 1, s, r]. The result has x's dtype,
    whatever theirs is under autocast.
    """
    turning, still = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    low, high = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat([-high, low], dim=-1) * sin
    return torch.cat([turned.to(x.dtype), still], dim=-1)


def scaled_frequencies(config: S2Config, device: torch.device) -> tuple[Tensor, float]:
    """Return RoPE's frequencies, and the factor of cosines and sines.

    Frequencies are radians per token of each pair of dimensions, fp32 [r / 2]. They are scaled for longer sequences as
    `rope_scaling` says: linear (arXiv 2306.15595), yarn (arXiv 2309.00071), llama3.
    """
    dim, base = int(config.head_dim * config.partial_rotary_factor), config.rope_theta
    powers = base ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    plain = 1.0 / powers
    scaling = getattr(config, "rope_parameters", None) or {}
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return plain, 1.0
    scale = scaling["factor"]
    divided = 1.0 / (scale * powers)
    if kind == "linear":
        return divided, 1.0
    length = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((length * plain / (2 * math.pi) - low) / (high - low)).clamp(0, 1)  # by turns within the length
        return (1 - kept) * divided + kept * plain, 1.0
    if kind != "yarn":
        raise ValueError(f"unknown kind of rope_scaling: {kind}")
    # the dimension whose frequency makes so many turns within the original length
    turns = [scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)]
    ends = [dim * math.log(length / (2 * math.pi * count)) / (2 * math.log(base)) for count in turns]
    if scaling.get("truncate", True):
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    first, last = max(ends[0], 0), min(ends[1], dim - 1)
    ramp = (torch.arange(dim // 2, device=device, dtype=torch.float32) - first) / (last - first or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    factor = scaling.get("attention_factor")
    return divided * (1 - kept) + plain * kept, 0.1 * math.log(scale) + 1 if factor is None else factor


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: S2Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each with a norm before and a residual."""

    def __init__(self, config: S2Config, layer: int, kernels: Kernels) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer, kernels)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Any, padding: list[int] | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, padding)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, config: S2Config) -> None:
        super().__init__()
        self.config, self.kernels = config, Kernels(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer, self.kernels) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids: Tensor, cache: Any, start: int, padding: list[int] | None) -> Tensor:
        """Compute the hidden states of tokens after those of `cache`.

        input_ids: [b, s], after the cache's `start` tokens; padding: how many tokens of each sequence, on the left.
        """
        x = self.embed_tokens(input_ids)
        positions = torch.arange(start, start + x.shape[1], device=x.device, dtype=torch.float32)
        if padding is not None:
            positions = (positions - positions.new_tensor(padding)[:, None, None]).clamp(min=0)  # [b, 1, s]
        frequencies, factor = scaled_frequencies(self.config, x.device)
        angles = positions[..., None] * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = (angles.cos() * factor).to(x.dtype), (angles.sin() * factor).to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, cache, padding)
        return self.norm(x)


def _left_padding(mask: Any, cache: Any, start: int, size: int) -> list[int] | None:
    """Return each sequence's padding on the left; None if there is none.

    Padding on the right is ignored. Between tokens it would shift them against the layout.
    """
    if mask is None:
        if getattr(cache, "s2_padded", False):
            raise ValueError("the cache holds padded sequences: pass the attention_mask of all tokens")
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise ValueError("the layout makes the mask: pass none, or one of [b, s], and a cache that grows")
    if mask.shape[1] != start + size:
        raise ValueError(f"attention_mask has {mask.shape[1]} columns for {start} cached and {size} new tokens")
    kept = mask != 0
    begins = kept & ~F.pad(kept, (1, 0))[:, :-1]
    if not bool((begins.sum(1) == 1).all()):
        raise ValueError("padded between tokens, or nothing but padding: pad at the ends of each sequence")
    padding = begins.int().argmax(1).tolist()
    if not any(padding):
        return None
    if cache is not None:
        cache.s2_padded = True
    return padding


def _check_positions(positions: Tensor | None, first: list[int], input_ids: Tensor, mask: Tensor | None) -> None:
    """Check that positions count up from each sequence's `first`.

    Positions are [s] or [b, s]; those whose token the mask drops aren't checked.
    """
    if positions is None:
        return
    size = input_ids.shape[1]
    expected = torch.tensor(first, device=positions.device)[:, None] + torch.arange(size, device=positions.device)
    same = positions == expected
    if mask is not None:
        same = same | (mask[:, -size:] == 0)
    if not bool(same.all()):
        raise ValueError(f"position_ids other than {first[0]}, {first[0] + 1}, …: documents have no gaps")


class S2ForCausalLM(PreTrainedModel, GenerationMixin):
    """The model; `forward` gives logits [b, s, vocab]."""

    config_class = S2Config
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules: ClassVar[list[str]] = ["Layer"]  # device_map="auto" leaves a layer on one device

    def __init__(self, config: S2Config) -> None:
        super().__init__(*([config] if PreTrainedModel is not nn.Module else []))
        try:
            check_layout(config.layout, config.num_hidden_layers, config.num_attention_heads)
        except ValueError as error:
            file = Path(getattr(config, "name_or_path", "")) / "config.json"
            raise ValueError(f"{file}: {error}. Export the checkpoint again (launch/export.py)") from error
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if PreTrainedModel is not nn.Module:
            self.post_init()

    @classmethod
    def from_folder(cls, folder: str) -> "S2ForCausalLM":
        """Load a folder's `config.json` and .safetensors files on the CPU.

        Weights keep their dtype.
        """
        from safetensors.torch import load_file

        file = Path(folder) / "config.json"
        try:
            config = S2Config(**json.loads(file.read_text()) | {"name_or_path": str(folder)})
        except (TypeError, ValueError) as error:
            problem = f"{file} can't be read ({type(error).__name__}: {error})"
            raise ValueError(f"{problem}. Export the checkpoint again (launch/export.py)") from error
        weights: dict[str, Tensor] = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            weights |= load_file(file)
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(weights, assign=True)
        return model.eval()

    def set_attention(self, choice: str) -> None:
        """Choose what computes attention.

        Args:
            choice: "kernels": s2train's, which skip what a head drops (on a CPU only for tests); "masks": torch's own
                attention with masks; "auto": kernels on a GPU where s2train is installed, else masks.
        """
        if choice not in ("auto", "kernels", "masks"):
            raise ValueError(f"attention must be auto, kernels or masks, got {choice!r}")
        if choice == "kernels" and BlockLayout is None:
            raise ValueError("s2train is not installed: pip install it, or choose masks")
        self.model.kernels.choice = choice

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        *,
        cache: Any = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int = 0,
        inputs_embeds: None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Any:
        """Return logits and, with labels [b, s], the mean loss.

        The mean is over tokens after the first, except where labels are -100. There is no `**kwargs`: an argument of
        another name, such as a later transformers may pass, is a TypeError.

        Args:
            input_ids: int64 [b, s], those after what the cache holds.
            attention_mask: 0 where padded, at the ends of a sequence; [b, s], with the cached tokens before.
            past_key_values, cache: keys and values so far, by the name that transformers has until 5.23 or from 5.24
                on; one that grows, such as DynamicCache.
            use_cache: make a cache where none is given.
            position_ids, cache_position: if given, those that follow from the cache, except where padded.
            logits_to_keep: only for so many tokens at the end; 0: for all.
        Raises:
            ValueError: padding, positions, a cache or outputs that this model can't have.
        """
        if cache is not None and past_key_values is not None:
            raise ValueError("two caches: pass it as cache or as past_key_values")
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = Cache() if DynamicCache is None else DynamicCache()
        if inputs_embeds is not None or return_dict is False or output_attentions or output_hidden_states:
            raise ValueError("it takes input_ids alone, and returns logits, loss and cache by name, nothing else")
        start = int(cache.get_seq_length()) if cache is not None else 0
        padding = _left_padding(attention_mask, cache, start, input_ids.shape[1])
        _check_positions(position_ids, [start - pad for pad in padding or [0]], input_ids, attention_mask)
        _check_positions(cache_position, [start], input_ids, attention_mask)
        hidden = self.model(input_ids, cache, start, padding)
        if logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        tied = self.config.tie_word_embeddings
        logits = self.model.embed_tokens(hidden, True) if tied else self.lm_head(hidden)
        loss = None
        if labels is not None:
            if logits_to_keep:
                raise ValueError("labels take the logits of all tokens: leave logits_to_keep out")
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return Output(loss=loss, logits=logits, **{_CACHE: cache})

    @torch.no_grad()
    def greedy(self, input_ids: Tensor, count: int) -> Tensor:
        """`input_ids` [b, s] and `count` more tokens, each the likeliest."""
        cache, tokens, new = Cache(), input_ids, input_ids
        for _ in range(count):
            new = self(new, cache=cache).logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, new], dim=1)
        return tokens
