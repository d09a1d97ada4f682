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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.models.clip import CLIPTextModel, EncodedText
from ldm.models.conditioning import Conditioning
from ldm.prompts.grammar import BREAK, Grammar, pieces
from ldm.prompts.tokenizer import CLIPTokenizer
from ldm.runtime import finite

COMMA_REACH = 20  # tokens: how far back a window may end at a comma
LONG_WORD = 8  # tokens: from here on a word may be divided


@dataclass(frozen=True)
class Vocabulary:
    """What cutting needs of a tokenizer.

    ids: of a text, without start and end. added: the ids of learnt words, whose further vectors are <cat>_1,
    <cat>_2 ... comma: its id, None where there is none.
    """

    ids: Callable[[str], Sequence[int]]
    added: Mapping[str, int]
    comma: int | None


@dataclass(frozen=True)
class Window:
    """The tokens of one window, without start, end and padding, and the weight of each."""

    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Clip:
    """A text encoder and the tokenizer that it was trained with."""

    tokenizer: CLIPTokenizer
    model: CLIPTextModel

    @property
    def window(self) -> int:
        """Tokens in one window, its start and end included."""
        return min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)

    @property
    def width(self) -> int:
        """Channels of an embedding."""
        return self.model.config.hidden_size

    @property
    def pools(self) -> bool:
        """Whether it gives pooled text too."""
        return self.model.config.projects

    def cut(self, prompt: str, grammar: Grammar = "plain") -> list[Window]:
        """The windows of a prompt: at least one, for the empty one too. Raises UserError, see `cut`."""
        return cut(prompt, self._vocabulary, self.window - 2, grammar)

    def count_windows(self, prompt: str, grammar: Grammar = "plain") -> int:
        """How many windows a prompt needs."""
        return len(self.cut(prompt, grammar))

    def tokenise(self, prompt: str, windows: int = 1) -> Tensor:
        """Token ids [windows, N] of plain text: start, up to N - 2 tokens, end, padding; see `fill`."""
        return self.fill(self.cut(prompt), windows)[0]

    def fill(self, cut: Sequence[Window], windows: int) -> tuple[Tensor, Tensor]:
        """Token ids and weights [windows, N]: start and end of each window, and padding, have weight 1.

        Windows left over are empty. Raises ValueError if there are more than `windows`.
        """
        if len(cut) > windows:
            raise ValueError(f"{len(cut)} windows of {self.window - 2} tokens do not fit into {windows}")
        start, end, pad = (
            self.tokenizer.bos_token_id,
            self.tokenizer.eos_token_id,
            self.tokenizer.pad_token_id,
        )
        rows, weights = [], []
        for each in [*cut, *[Window()] * (windows - len(cut))]:
            room = self.window - 2 - len(each.ids)
            rows.append([start, *each.ids, end, *[pad] * room])
            weights.append([1.0, *each.weights, 1.0, *[1.0] * room])
        return torch.tensor(rows), torch.tensor(weights)

    def encode(
        self,
        prompts: Sequence[str],
        windows: int,
        layer: int = -1,
        norm: bool = True,
        grammar: Grammar = "plain",
    ) -> Conditioning:
        """Tokens [B, windows * N, D] and, where it pools, pooled text [B, P] of each prompt, fp32.

        Args:
            layer: whose output to take: -1 is the last layer, -2 the penultimate.
            norm: put it through the final norm.
            grammar: how weights are written, and what they do; pooled text has none.
        """
        filled = [self.fill(self.cut(prompt, grammar), windows) for prompt in prompts]
        ids, weights = (torch.cat(each) for each in zip(*filled, strict=True))
        if grammar == "comfy" and bool((weights != 1).any()):  # one row more: the empty window
            ids = torch.cat([ids, self.fill([Window()], 1)[0]])
        hidden, *pooled = finite(self.model, lambda model: _read(model, ids, layer, norm), "the text encoder")
        hidden = weighted(hidden[: len(weights)], weights, hidden[len(weights) :])
        return self._join((hidden, *(each[: len(weights)] for each in pooled)), windows)

    def read(self, ids: Tensor, windows: int, layer: int = -1, norm: bool = True) -> Conditioning:
        """As `encode`, of token ids [B * windows, N], with gradients and unchecked: for training."""
        return self._join(_read(self.model, ids, layer, norm), windows)

    def _join(self, read: tuple[Tensor, ...], windows: int) -> Conditioning:
        """The windows of each prompt, [B * windows, N, D] as `_read` gives them, one after the other."""
        tokens, *pooled = read
        tokens = tokens.reshape(len(tokens) // windows, -1, self.width)
        return Conditioning(tokens, pooled[0][::windows] if pooled else None)

    @property
    def _vocabulary(self) -> Vocabulary:
        comma = self.tokenizer.convert_tokens_to_ids(",</w>")
        known = comma != self.tokenizer.unk_token_id
        return Vocabulary(self.tokenizer.ids, self.tokenizer.get_added_vocab(), comma if known else None)


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
        grammar: Grammar = "plain",
    ) -> Conditioning:
        """The tokens [B, windows * N, D] and pooled text [B, P] of each prompt, fp32.

        Args:
            prompts: B texts; "" is the unconditional one.
            clip_skip: leave out that many layers more than the model itself does: without pooled text the
                last one (1 is the penultimate, then norm), with it the last but one (1 is the one before).
            windows: how many to read, for all prompts alike; by default as many as the longest needs.
            prompts_2: what the second encoder reads, by default the same.
            grammar: how weights are written in them.

        Raises:
            UserError: for a clip_skip that leaves no layer, and for weights that are not allowed.
        """
        each, needed = self._columns(prompts, prompts_2), self.count_windows(prompts, prompts_2, grammar)
        if needed > 1:
            warnings.warn(
                f"a prompt is longer than the {self.window - 2} tokens that this text encoder reads at once: "
                f"it is read in {needed} parts",
                stacklevel=2,
            )
        layer, norm = self._layer(clip_skip)
        return _concatenate(
            [clip.encode(column, windows or needed, layer, norm, grammar) for clip, column in each]
        )

    def count_windows(
        self, prompts: Sequence[str], prompts_2: Sequence[str] | None = None, grammar: Grammar = "plain"
    ) -> int:
        """How many windows the longest of these prompts needs."""
        return max(
            clip.count_windows(text, grammar)
            for clip, texts in self._columns(prompts, prompts_2)
            for text in texts
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
        layers = min(clip.model.config.num_hidden_layers for clip in self.clips) - self.pools
        if clip_skip is not None and not 0 <= clip_skip < layers:
            raise UserError(
                f"clip_skip {clip_skip} is not allowed: this text encoder has {layers} layers to read from"
            )
        return clip_skip or 0


def _concatenate(read: Sequence[Conditioning]) -> Conditioning:
    """What several encoders read: tokens side by side, and the last one's pooled text."""
    return Conditioning(torch.cat([part.tokens for part in read], -1), read[-1].pooled)


def _read(model: CLIPTextModel, ids: Tensor, layer: int, norm: bool) -> tuple[Tensor, ...]:
    """[B, N] ids -> a layer's output [B, N, D] and, where the model has any, its pooled text [B, P]."""
    out: EncodedText = model(ids.to(next(model.parameters()).device))
    hidden = out.hidden_states[layer]
    if norm:
        hidden = model.text_model.final_layer_norm(hidden)
    return (hidden,) if out.text_embeds is None else (hidden, out.text_embeds)


def weighted(hidden: Tensor, weights: Tensor, empty: Tensor) -> Tensor:
    """The embeddings [R, N, D] of R windows with the weights [R, N], on the CPU, of their tokens.

    As in AUTOMATIC1111: ``z w``, then times ``mean(z) / mean(z w)``, the mean over one window (there it is
    over the whole batch, so that a picture would depend on its neighbours). Where `empty`, the embedding of
    an empty window [1, N, D], is given, as in ComfyUI: ``empty + w (z - empty)``. What has weight 1
    throughout is the same to the last bit.

    Raises:
        UserError: if weights bring a mean to 0, so that nothing finite is left.
    """
    changed = (weights != 1).any(1).nonzero().flatten()
    if not len(changed):
        return hidden
    w, changed = weights[changed, :, None].to(hidden), changed.to(hidden.device)
    z = hidden[changed]
    if len(empty):
        z = torch.where(w == 1, z, empty + w * (z - empty))
    else:
        z = z * w * (z.mean((1, 2), keepdim=True) / (z * w).mean((1, 2), keepdim=True))
    if not bool(z.isfinite().all()):
        raise UserError(
            "the weights of the prompt cancel each other: nothing finite is left of its embedding"
        )
    return hidden.index_put((changed,), z)


# --- windows -----------------------------------------------------------------------------------------------


def cut(prompt: str, vocabulary: Vocabulary, room: int, grammar: Grammar = "plain") -> list[Window]:
    """A prompt as windows of up to `room` tokens: at least one.

    - plain: a window ends where it is full.
    - a1111: a full one ends at its last comma, if that is not more than 20 tokens back; any ends at BREAK,
      and before a learnt word that does not fit in it.
    - comfy: it ends before a word of less than 8 tokens that does not fit in it.

    Raises UserError for weights that are not allowed.
    """
    windows: list[list[tuple[int, float]]] = [[]]
    comma = None  # where the last one of this window is
    for piece in pieces(prompt, grammar):
        if piece is BREAK:
            windows.append([])
            comma = None
            continue
        for ids in _groups(piece.text, vocabulary, grammar, room):
            window = windows[-1]
            is_comma = grammar == "a1111" and ids == [vocabulary.comma]
            if not is_comma and comma is not None and len(window) == room and room - comma <= COMMA_REACH:
                windows[-1:] = [window[: comma + 1], window[comma + 1 :]]
                comma = None
            if len(windows[-1]) + len(ids) > room:
                windows.append([])
                comma = None
            if is_comma:
                comma = len(windows[-1])
            windows[-1] += [(i, piece.weight) for i in ids]
    if len(windows) > 1 and not windows[-1]:
        windows.pop()
    return [Window(tuple(i for i, _ in each), tuple(weight for _, weight in each)) for each in windows]


def _groups(text: str, vocabulary: Vocabulary, grammar: Grammar, room: int) -> Iterator[list[int]]:
    """Ids that come into one window if they can."""
    for word in text.split() if grammar == "comfy" else [text]:
        groups = spell_out(vocabulary.ids(word), vocabulary.added)
        whole = [i for group in groups for i in group]
        if grammar == "comfy" and len(whole) < LONG_WORD:
            groups = [whole]
        for group in groups:
            one_by_one = grammar == "plain" or len(group) > room
            yield from ([i] for i in group) if one_by_one else [group]


def spell_out(ids: Sequence[int], added: Mapping[str, int]) -> list[list[int]]:
    """Each id, of a learnt word with those of its further vectors: <cat> is <cat> <cat>_1 <cat>_2 ..."""
    words = {i: word for word, i in added.items()}
    spelt: list[list[int]] = []
    for i in ids:
        names = (f"{words[i]}_{n}" for n in itertools.count(1)) if i in words else ()
        spelt.append([i, *(added[name] for name in itertools.takewhile(added.__contains__, names))])
    return spelt
