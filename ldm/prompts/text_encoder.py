"""Prompt -> token ids -> embedding: CLIP's tokenizers and text encoders, for prompts of any length.

A text encoder reads one window of `model_max_length` tokens (77 in Stable Diffusion). A longer prompt is not
cut: it is read in several windows, each with its own start and end, and their embeddings follow each other.

SD 1 and 2 have one encoder and take its last layer. SDXL has two, side by side in the channels, takes the
last layer but one without the final norm, and also the second's pooled text, which is that of the first
window. Its refiner has the second only.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.models.conditioning import Conditioning
from ldm.runtime import finite


@dataclass(frozen=True)
class Clip:
    """transformers' CLIPTokenizer and its CLIPTextModel or CLIPTextModelWithProjection."""

    tokenizer: Any
    model: Any

    @property
    def window(self) -> int:
        """Tokens in one window, its start and end included."""
        return min(int(self.tokenizer.model_max_length), int(self.model.config.max_position_embeddings))

    @property
    def width(self) -> int:
        """Channels of an embedding."""
        return int(self.model.config.hidden_size)

    @property
    def pools(self) -> bool:
        """Whether it gives pooled text too."""
        return hasattr(self.model, "text_projection")

    def count_windows(self, prompt: str) -> int:
        """How many windows a prompt needs: at least 1, for the empty one too."""
        return max(1, -(-len(self._ids(prompt)) // (self.window - 2)))

    def tokenise(self, prompt: str, windows: int = 1) -> Tensor:
        """Token ids [windows, N]: start, up to N - 2 tokens, end, padding; windows left over are empty.

        Raises ValueError if the prompt needs more windows.
        """
        ids, room = self._ids(prompt), self.window - 2
        if len(ids) > windows * room:
            raise ValueError(f"{len(ids)} tokens do not fit into {windows} windows of {room}")
        start, end, pad = (
            self.tokenizer.bos_token_id,
            self.tokenizer.eos_token_id,
            self.tokenizer.pad_token_id,
        )
        rows = [[start, *ids[i * room : (i + 1) * room], end] for i in range(windows)]
        return torch.tensor([row + [pad] * (self.window - len(row)) for row in rows])

    def encode(
        self, prompts: Sequence[str], windows: int, layer: int = -1, norm: bool = True
    ) -> Conditioning:
        """Tokens [B, windows * N, D] and, where it pools, pooled text [B, P] of each prompt, fp32.

        Args:
            layer: whose output to take: -1 is the last layer, -2 the penultimate.
            norm: put it through the final norm.
        """
        ids = torch.cat([self.tokenise(prompt, windows) for prompt in prompts])
        read = finite(self.model, lambda model: _read(model, ids, layer, norm), "the text encoder")
        return self._join(read, windows)

    def read(self, ids: Tensor, windows: int, layer: int = -1, norm: bool = True) -> Conditioning:
        """As `encode`, of token ids [B * windows, N], with gradients and unchecked: for training."""
        return self._join(_read(self.model, ids, layer, norm), windows)

    def _join(self, read: tuple[Tensor, ...], windows: int) -> Conditioning:
        """The windows of each prompt, [B * windows, N, D] as `_read` gives them, one after the other."""
        tokens, *pooled = read
        tokens = tokens.reshape(len(tokens) // windows, -1, self.width)
        return Conditioning(tokens, pooled[0][::windows] if pooled else None)

    def _ids(self, prompt: str) -> list[int]:
        # Without `verbose` transformers would complain of the length, which is no fault here.
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        return spell_out(ids, self.tokenizer.get_added_vocab())


@dataclass(frozen=True)
class TextEncoder:
    """All that a model reads prompts with: one or two encoders, or none where embeddings are given."""

    clips: tuple[Clip, ...]

    @property
    def window(self) -> int:
        """Tokens in one window, its start and end included."""
        return self.clips[0].window

    @property
    def width(self) -> int:
        """Channels D of an embedding."""
        return sum(clip.width for clip in self.clips)

    @property
    def pools(self) -> bool:
        """Whether it gives pooled text too (SDXL)."""
        return any(clip.pools for clip in self.clips)

    @property
    def device(self) -> torch.device:
        """Where embeddings are made."""
        device: torch.device = next(self.clips[0].model.parameters()).device
        return device

    def encode(
        self,
        prompts: Sequence[str],
        clip_skip: int | None = None,
        windows: int | None = None,
        prompts_2: Sequence[str] | None = None,
    ) -> Conditioning:
        """The tokens [B, windows * N, D] and pooled text [B, P] of each prompt, fp32.

        Args:
            prompts: B texts; "" is the unconditional one.
            clip_skip: leave out that many layers more than the model itself does: without pooled text the
                last one (1 is the penultimate, then norm), with it the last but one (1 is the one before).
            windows: how many to read, for all prompts alike; by default as many as the longest needs.
            prompts_2: what the second encoder reads, by default the same.

        Raises:
            UserError: for a clip_skip that leaves no layer.
        """
        each, needed = self._columns(prompts, prompts_2), self.count_windows(prompts, prompts_2)
        if needed > 1:
            warnings.warn(
                f"a prompt is longer than the {self.window - 2} tokens that this text encoder reads at once: "
                f"it is read in {needed} parts",
                stacklevel=2,
            )
        layer, norm = self._layer(clip_skip)
        return _concatenate([clip.encode(column, windows or needed, layer, norm) for clip, column in each])

    def count_windows(self, prompts: Sequence[str], prompts_2: Sequence[str] | None = None) -> int:
        """How many windows the longest of these prompts needs."""
        return max(
            clip.count_windows(text) for clip, texts in self._columns(prompts, prompts_2) for text in texts
        )

    def _columns(
        self, prompts: Sequence[str], prompts_2: Sequence[str] | None
    ) -> list[tuple[Clip, Sequence[str]]]:
        """Each encoder with what it reads. Raises UserError where there is none."""
        if not self.clips:
            raise UserError(
                "this model has no text encoder: give prompt_embeds and negative_prompt_embeds, or load one "
                "(text_encoder=)"
            )
        texts = [prompts, prompts if prompts_2 is None else prompts_2][: len(self.clips)]
        return list(zip(self.clips, texts, strict=True))

    def tokenise(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Token ids [B * windows, N] of B prompts for each encoder, as `read` takes them."""
        windows = max(clip.count_windows(prompt) for clip in self.clips for prompt in prompts)
        return tuple(torch.cat([clip.tokenise(prompt, windows) for prompt in prompts]) for clip in self.clips)

    def read(self, ids: Sequence[Tensor], windows: int, clip_skip: int | None = None) -> Conditioning:
        """As `encode`, of what `tokenise` gives, with gradients and unchecked: for training."""
        layer, norm = self._layer(clip_skip)
        each = zip(self.clips, ids, strict=True)
        return _concatenate([clip.read(own, windows, layer, norm) for clip, own in each])

    def _layer(self, clip_skip: int | None) -> tuple[int, bool]:
        """Which layer's output is taken, and whether it goes through the final norm."""
        return -1 - self.pools - self._skipped(clip_skip), not self.pools

    def _skipped(self, clip_skip: int | None) -> int:
        layers = min(int(clip.model.config.num_hidden_layers) for clip in self.clips) - self.pools
        if clip_skip is not None and not 0 <= clip_skip < layers:
            raise UserError(
                f"clip_skip {clip_skip} is not allowed: this text encoder has {layers} layers to read from"
            )
        return clip_skip or 0


def _concatenate(read: Sequence[Conditioning]) -> Conditioning:
    """What several encoders read: tokens side by side, and the last one's pooled text."""
    return Conditioning(torch.cat([part.tokens for part in read], -1), read[-1].pooled)


def spell_out(ids: Sequence[int], added: Mapping[str, int]) -> list[int]:
    """The ids with each learnt word's further vectors after its first: <cat> is <cat> <cat>_1 <cat>_2 ..."""
    words = {i: word for word, i in added.items()}
    spelt: list[int] = []
    for i in ids:
        spelt.append(i)
        if i in words:
            further = (added.get(f"{words[i]}_{n}") for n in itertools.count(1))
            spelt += itertools.takewhile(lambda each: each is not None, further)  # type: ignore[arg-type]
    return spelt


def _read(model: Any, ids: Tensor, layer: int, norm: bool) -> tuple[Tensor, ...]:
    """[B, N] ids -> a layer's output [B, N, D] and, where the model has any, its pooled text [B, P]."""
    out = model(input_ids=ids.to(next(model.parameters()).device), output_hidden_states=True)
    hidden = out.hidden_states[layer]
    if norm:
        # transformers < 5.6 keeps the layers in an inner module.
        final_norm: nn.Module = getattr(model, "text_model", model).final_layer_norm
        hidden = final_norm(hidden)
    return (hidden, out.text_embeds) if "text_embeds" in out else (hidden,)
