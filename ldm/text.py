"""Prompt -> token ids -> embedding: CLIP's tokenizer and text encoder, for prompts of any length.

A text encoder reads one window of `model_max_length` tokens (77 in Stable Diffusion). A longer prompt is not
cut: it is read in several windows, each with its own start and end, and their embeddings follow each other.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.runtime import finite


@dataclass(frozen=True)
class TextEncoder:
    """transformers' CLIPTokenizer and CLIPTextModel."""

    tokenizer: Any
    model: Any

    @property
    def window(self) -> int:
        """Tokens in one window, its start and end included."""
        return min(int(self.tokenizer.model_max_length), int(self.model.config.max_position_embeddings))

    @property
    def width(self) -> int:
        """Channels D of an embedding."""
        return int(self.model.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where embeddings are made."""
        device: torch.device = next(self.model.parameters()).device
        return device

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
        self, prompts: Sequence[str], clip_skip: int | None = None, windows: int | None = None
    ) -> Tensor:
        """The embedding of each prompt: [B, windows * N, D], fp32.

        Args:
            prompts: B texts; "" is the unconditional one.
            clip_skip: leave out that many of the last layers (1: the penultimate layer's output), then norm.
            windows: how many to read, for all prompts alike; by default as many as the longest needs.

        Raises:
            UserError: for a clip_skip that leaves no layer.
        """
        needed = max(map(self.count_windows, prompts))
        windows = windows or needed
        if needed > 1:
            warnings.warn(
                f"a prompt is longer than the {self.window - 2} tokens that this text encoder reads at once: "
                f"it is read in {needed} parts",
                stacklevel=2,
            )
        ids = torch.cat([self.tokenise(prompt, windows) for prompt in prompts])
        tokens = finite(self.model, lambda model: _hidden(model, ids, clip_skip), "the text encoder")
        return tokens.reshape(len(prompts), -1, tokens.shape[-1])

    def _ids(self, prompt: str) -> list[int]:
        # Without `verbose` transformers would complain of the length, which is no fault here.
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def _hidden(model: Any, ids: Tensor, clip_skip: int | None) -> Tensor:
    """[B, N] ids -> [B, N, D]: the last layer's output, or an earlier one's, through the final norm."""
    layers = model.config.num_hidden_layers
    if clip_skip is not None and not 0 <= clip_skip < layers:
        raise UserError(f"clip_skip {clip_skip} is not allowed: this text encoder has {layers} layers")
    ids = ids.to(next(model.parameters()).device)
    if not clip_skip:
        last: Tensor = model(input_ids=ids).last_hidden_state
        return last
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-(clip_skip + 1)]
    # transformers < 5.6 keeps the layers in an inner module.
    final_norm: nn.Module = getattr(model, "text_model", model).final_layer_norm
    normed: Tensor = final_norm(hidden)
    return normed
