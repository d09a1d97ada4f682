"""CLIP's text encoder (Radford et al. 2021, section 2.4), with transformers' configs and parameter names.

A pre-norm transformer in which each token sees itself and those before it, so that the end of the text has
seen all of it: its state is the pooled text. What comes after the end changes nothing before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.errors import UserError
from ldm.models.attention import merge_heads, split_heads
from ldm.models.config import read_config, write_config
from ldm.models.layers import by_rows

PLAIN, PROJECTING = CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
HIGHEST = 2  # an eos_token_id that no CLIP has: configs from before transformers' pull request 24773 say it


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), an approximation of GELU (Hendrycks and Gimpel 2016, section 2)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True)
class CLIPTextConfig:
    """Shape of a text encoder, with the names and defaults of transformers' CLIPTextConfig."""

    vocab_size: int = 49408
    """Rows of the table of token embeddings."""
    hidden_size: int = 512
    """Width of the embeddings."""
    intermediate_size: int = 2048
    """Width inside the feed-forward layers."""
    projection_dim: int = 512
    """Width of the pooled text, where it is projected."""
    num_hidden_layers: int = 12
    """Transformer layers."""
    num_attention_heads: int = 8
    """Heads of each attention."""
    max_position_embeddings: int = 77
    """Tokens of the longest text."""
    hidden_act: str = "quick_gelu"
    """Activation in the feed-forward layers: quick_gelu (OpenAI's) or gelu (OpenCLIP's)."""
    layer_norm_eps: float = 1e-5
    """Epsilon of the layer norms."""
    attention_dropout: float = 0.0
    """Probability by which attention weights are dropped in training."""
    initializer_range: float = 0.02
    """Kept for transformers, as the next one: how it begins a training."""
    initializer_factor: float = 1.0
    pad_token_id: int | None = 1
    """Kept for transformers, as the next one: the tokenizer says them."""
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407
    """The end of a text, at which it is pooled; 2 means the highest id, wherever it is."""
    projects: bool = False
    """Whether there is a projection of the pooled text: what `architectures` says."""

    def __post_init__(self) -> None:
        for each in fields(self):
            size = getattr(self, each.name)
            if each.name in SIZES and size < 1:
                raise UserError(f"{each.name} = {size!r} is not allowed: give a whole number from 1 on")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size = {self.hidden_size} cannot be shared out among "
                f"num_attention_heads = {self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(
                f"hidden_act = {self.hidden_act!r} is not supported, only {' or '.join(ACTIVATIONS)}"
            )


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class EncodedText:
    """What a text encoder makes of token ids [B, N]."""

    last_hidden_state: Tensor  # [B, N, D], the last layer's output with the final norm
    pooler_output: Tensor  # [B, D], that at the end of each text
    hidden_states: tuple[Tensor, ...]  # [B, N, D] each: the embeddings, and each layer's output, without norm
    text_embeds: Tensor | None  # [B, P], the pooled text projected

    def __getitem__(self, place: int) -> Tensor | tuple[Tensor, ...]:
        """As transformers' outputs count: the projected text first, where there is one; or the last state."""
        if self.text_embeds is not None:
            return (self.text_embeds, self.last_hidden_state, self.hidden_states)[place]
        return (self.last_hidden_state, self.pooler_output, self.hidden_states)[place]


class CLIPTextModel(nn.Module):
    """Token ids [B, N] -> `EncodedText`; with a projection, transformers' CLIPTextModelWithProjection."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = _Transformer(config)
        projects, width = config.projects, config.hidden_size
        self.text_projection = nn.Linear(width, config.projection_dim, bias=False) if projects else None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The text encoder of a `config.json`; other keys than ours say nothing of it. Raises UserError."""
        name = (config.get("architectures") or [PLAIN])[0]
        if name not in CLASSES:
            raise UserError(f"a {name}; only {' or '.join(CLASSES)} can be read")
        # transformers writes what it knows of any model into each config.
        ours = {each.name for each in fields(CLIPTextConfig)}
        values = {key: value for key, value in config.items() if key in ours}
        values |= {"_class_name": name, "projects": name == PROJECTING}
        return cls(read_config(CLIPTextConfig, values, {}))

    def to_config(self) -> dict[str, Any]:
        """The dict that transformers saves in `config.json`."""
        values = write_config(self.config, self.class_name)
        del values["_class_name"], values["projects"]
        return {"architectures": [self.class_name], "model_type": "clip_text_model", **values}

    @property
    def class_name(self) -> str:
        """That of transformers."""
        return PLAIN if self.text_projection is None else PROJECTING

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of token embeddings, which `set_input_embeddings` replaces."""
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, table: nn.Module) -> None:
        """Another table, of as many channels."""
        self.text_model.embeddings.token_embedding = table  # type: ignore[assignment]  # any will do

    def forward(self, input_ids: Tensor, output_hidden_states: bool = True) -> EncodedText:
        """N up to `max_position_embeddings`. Hidden states are there in any case, asked for or not."""
        hidden = self.text_model(input_ids)
        last = self.text_model.final_layer_norm(hidden[-1])
        end = self.config.eos_token_id
        at = (input_ids if end == HIGHEST else (input_ids == end).int()).argmax(-1)  # the first one
        pooled = last[torch.arange(len(last), device=last.device), at]
        projected = None if self.text_projection is None else by_rows(self.text_projection, pooled)
        return EncodedText(last, pooled, hidden, projected)


class _Transformer(nn.Module):
    """Token ids [B, N] -> the embeddings and each layer's output, [B, N, D]."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Layers(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        hidden = [self.embeddings(input_ids)]
        for layer in self.encoder.layers:
            hidden.append(layer(hidden[-1]))
        return tuple(hidden)


class _Layers(nn.Module):
    """A name, no more."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))


class _Embeddings(nn.Module):
    """Token ids [B, N] -> [B, N, D]: each token's row, and its place's."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        out: Tensor = self.token_embedding(input_ids) + self.position_embedding(places)
        return out


class CLIPEncoderLayer(nn.Module):
    """[B, N, D] -> [B, N, D]: attention and feed-forward, each added to its input."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.self_attn = _Attention(width, config.num_attention_heads, config.attention_dropout)
        self.layer_norm2 = nn.LayerNorm(width, eps)
        self.mlp = _FeedForward(width, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class _Attention(nn.Module):
    """[B, N, D] -> [B, N, D]: each token attends to itself and to those before it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(to(x), self.heads) for to in (self.q_proj, self.k_proj, self.v_proj))
        dropout = self.dropout if self.training else 0.0
        out: Tensor = self.out_proj(merge_heads(_attend(q, k, v, dropout)))
        return out


def _attend(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(d) + M) v, where M is -inf for keys that come after the query: [B, heads, N, d].

    (Vaswani et al. 2017, equation 1 and section 3.2.3.)
    """
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        # SDPA's backward is slow on a CPU for so few tokens: 0.16 against 0.12 s for 32 captions of 48.
        after = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(after, float("-inf"))
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(F.dropout(weights, dropout), v)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


class _FeedForward(nn.Module):
    """[B, N, D] -> [B, N, D] through `inner` channels."""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.activation(self.fc1(x)))
        return out
