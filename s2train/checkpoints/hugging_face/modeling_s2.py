"""A Llama whose heads each keep their own blocks of keys: sparse/dense hybrid attention, as `config.json` lays it out.

Stands alone: it needs torch, and safetensors to load weights. Without transformers:

    model = S2ForCausalLM.from_folder(".")
    logits = model(input_ids).logits
    tokens = model.greedy(input_ids, 20)

With transformers 4.48 to 5.24: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.

Attention is computed by torch with masks, for correctness everywhere; it does not skip what is masked. Documents start
at position 0: pad on the right, and don't generate from padded prompts.
"""

import base64
import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
        **other: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.rms_norm_eps, self.rope_theta = rms_norm_eps, rope_theta
        self.partial_rotary_factor = partial_rotary_factor
        self.max_position_embeddings = max_position_embeddings
        self.tie_word_embeddings = tie_word_embeddings
        dense = [[0] * num_attention_heads] * num_hidden_layers
        self.layout = layout or {"block_size": 64, "patterns": [{"kind": "dense"}], "layers": dense}
        if PretrainedConfig is not object:
            super().__init__(tie_word_embeddings=tie_word_embeddings, **other)


def keeps(pattern: dict, query: Tensor, key: Tensor) -> Tensor:
    """Does a head keep (query block, key block)? int64 indices in, bool of the shape that they broadcast to out.

    A pattern is causal in blocks; token by token causality comes on top.
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
    elif kind == "mask":  # a row is packed into bytes, key block j in bit j % 8 of byte j // 8
        size = pattern["num_blocks"]
        if int(query.max()) >= size:
            raise ValueError(f"the layout's masks end at {size} blocks: shorten the sequence")
        bits = torch.frombuffer(bytearray(base64.b64decode(pattern["bits"])), dtype=torch.uint8).view(size, -1)
        kept = (bits.to(key.device)[query, key >> 3] >> (key & 7).to(torch.uint8)) & 1 == 1
    else:
        raise ValueError(f"unknown kind of pattern: {kind}")
    return kept & (distance >= 0)


def token_mask(patterns: list, heads: list, block_size: int, first: int, stop: int, device: torch.device) -> Tensor:
    """Which keys 0 … stop - 1 the queries first … stop - 1 of every head see: bool [heads, stop - first, stop]."""
    query, key = torch.arange(first, stop, device=device), torch.arange(stop, device=device)
    blocks = torch.arange((stop - 1) // block_size + 1, device=device)
    rows = blocks[first // block_size :]
    names = sorted(set(heads))
    kept = torch.stack([keeps(patterns[name], rows[:, None], blocks[None, :]) for name in names])
    kept = kept[:, query // block_size - first // block_size][:, :, key // block_size]
    kept = kept & (query[:, None] >= key[None, :])
    return kept[[names.index(head) for head in heads]]


class Cache:
    """Keys and values of all layers so far, as transformers' DynamicCache has them."""

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


class Attention(nn.Module):
    """Grouped-query attention over the blocks that each head keeps."""

    def __init__(self, config: S2Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Any) -> Tensor:
        """x: [b, s, hidden]; cos, sin: [s, dimensions that turn]."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            whole = cache.get_seq_length() + k.shape[2] if self.layer == 0 else None
            k, v = cache.update(k, v, self.layer)
            if whole is not None and k.shape[2] != whole:
                problem = f"gives {k.shape[2]} keys back where {whole} are known"
                raise ValueError(f"{type(cache).__name__} {problem}: use a cache that grows, such as DynamicCache")
        return self.o_proj(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [b, heads, s_q, d], at the end of the keys; k, v: [b, KV heads, s_k, d]."""
        layout, device = self.config.layout, q.device
        heads, patterns = layout["layers"][self.layer], layout["patterns"]
        before = k.shape[2] - q.shape[2]
        parts = []
        for first in range(0, q.shape[2], _ROWS):
            rows = q[:, :, first : first + _ROWS]
            stop = before + first + rows.shape[2]
            mask = token_mask(patterns, heads, layout["block_size"], before + first, stop, device)
            parts.append(
                F.scaled_dot_product_attention(
                    rows, k[:, :, :stop], v[:, :, :stop], attn_mask=mask[None], enable_gqa=k.shape[1] != q.shape[1]
                )
            )
        return torch.cat(parts, dim=2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [b, heads, s, d] in its first r dimensions: dimension i turns with i + r / 2.

    cos, sin: [s, r].
    """
    turning, still = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    low, high = turning.chunk(2, dim=-1)
    return torch.cat([turning * cos + torch.cat([-high, low], dim=-1) * sin, still], dim=-1)


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
    """Attention and MLP, each with a norm before it and added to its input."""

    def __init__(self, config: S2Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, config: S2Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids: Tensor, cache: Any, start: int) -> Tensor:
        """input_ids: [b, s] at positions start, start + 1, …, which is how many tokens `cache` holds."""
        x = self.embed_tokens(input_ids)
        dim = int(self.config.head_dim * self.config.partial_rotary_factor)
        positions = torch.arange(start, start + x.shape[1], device=x.device, dtype=torch.float32)
        exponents = torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim
        angles = torch.outer(positions, 1.0 / (self.config.rope_theta**exponents)).repeat(1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, cache)
        return self.norm(x)


def _check_mask(mask: Any) -> None:
    """Padding at the end only: anywhere else tokens would be shifted against the layout, or see what is padding."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise ValueError("the layout makes the mask: pass none, or one of [b, s], and a cache that grows")
    kept = mask != 0
    if not bool((kept[:, :-1] >= kept[:, 1:]).all()) or not bool(kept[:, :1].all()):
        raise ValueError("padded before a token, which would shift the layout: pad on the right, and not in a prompt")


def _check_positions(positions: Tensor | None, start: int, input_ids: Tensor, mask: Tensor | None) -> None:
    """Whether [s] or [b, s] positions are those that this model counts itself, where the mask keeps a token."""
    if positions is None:
        return
    size = input_ids.shape[1]
    same = positions == torch.arange(start, start + size, device=positions.device)
    if mask is not None:
        same = same | (mask[:, -size:] == 0)
    if not bool(same.all()):
        raise ValueError(f"position_ids other than {start}, {start + 1}, …: documents start at 0 and have no gaps")


class S2ForCausalLM(PreTrainedModel, GenerationMixin):
    """The model; `forward` gives logits [b, s, vocab]."""

    config_class = S2Config
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, config: S2Config) -> None:
        super().__init__(*([config] if PreTrainedModel is not nn.Module else []))
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if PreTrainedModel is not nn.Module:
            self.post_init()

    @classmethod
    def from_folder(cls, folder: str) -> "S2ForCausalLM":
        """Load `config.json` and the .safetensors files of a folder, in their dtype, on the CPU."""
        from safetensors.torch import load_file

        config = json.loads((Path(folder) / "config.json").read_text())
        weights: dict[str, Tensor] = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            weights |= load_file(file)
        with torch.device("meta"):
            model = cls(S2Config(**config))
        model.load_state_dict(weights, assign=True)
        return model.eval()

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
        """Logits, and with labels [b, s] the mean loss of each token after the first (-100: none).

        There is no `**kwargs`: an argument of another name, such as a later transformers may pass, is a TypeError.

        Args:
            input_ids: int64 [b, s], those after what the cache holds.
            attention_mask: 0 where padded, at the right only, which needs no masking.
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
        _check_mask(attention_mask)
        for positions in (position_ids, cache_position):
            _check_positions(positions, start, input_ids, attention_mask)
        hidden = self.model(input_ids, cache, start)
        if logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = F.linear(hidden, self.model.embed_tokens.weight) if self.config.tie_word_embeddings else None
        logits = self.lm_head(hidden) if logits is None else logits
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
