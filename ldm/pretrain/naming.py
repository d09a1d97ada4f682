"""Training the text encoder to name what its caption tells: things, their colours, which is first, all else.

No pictures are needed, so every caption is a new one. A tower that names things makes them bind in the
U-Net's training from its beginning; without it captions are ignored for tens of thousands of samples.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoint import load_tokenizer, save_text_encoder, save_tokenizer
from ldm.checkpoint.peers import fresh_text_encoder
from ldm.models.clip import CLIPTextModel
from ldm.postcards.sprites import captions, mixture
from ldm.postcards.sprites.labels import AnyScene, Labels, kind_number
from ldm.postcards.sprites.scene import Scene
from ldm.postcards.sprites.table import sprite_world
from ldm.pretrain.clip import tokenise
from ldm.pretrain.recipe import DataSection
from ldm.pretrain.sprites import make_mixture, scene_of
from ldm.pretrain.vocabulary import known_words, train_vocabulary
from ldm.prompts.tokenizer import CLIPTokenizer
from ldm.prompts.world import TABLE
from ldm.train.recipe import loss_settings
from ldm.train.task import Batch, Task

_SURVEY = 20_000  # scenes whose captions the vocabulary and the list of words are taken from, at most


class NamingTask(Task):
    """Trains a CLIPTextModel on the captions of `data`. loss key: rare, the weight of what is there.

    Binary cross-entropy of all that `Labels` numbers, read off the pooled state by one linear layer.
    """

    def __init__(
        self, data: DataSection, tokenizer_dir: Path, text: CLIPTextModel, loss: dict[str, float]
    ) -> None:
        super().__init__()
        self.data, self.tokenizer_dir, self.text_encoder = data, tokenizer_dir, text
        self.tokenizer = load_tokenizer(tokenizer_dir)
        self.mixed = make_mixture(data)
        self.labels = Labels(len(self.mixed.world.things))
        self.naming = nn.Linear(text.config.hidden_size, self.labels.total)
        nn.init.constant_(self.naming.bias, -6.0)  # most is not there
        self.rare = loss_settings({"rare": 2.0}, loss)["rare"]

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        embedding = self.text_encoder.get_input_embeddings().weight
        others = [p for p in self.parameters() if p is not embedding]
        return [{"params": others, "lr": lr}, {"params": [embedding], "lr": lr, "muon": False}]

    def batch(self, rng: torch.Generator, size: int, number: int = 0) -> Batch:
        seeds = torch.randint(2**62, (size,), generator=rng).tolist()
        generators = [random.Random(seed) for seed in seeds]
        scenes = [self.mixed.sample(each) for each in generators]
        texts = [
            mixture.caption(scene, each, self.data.reworded)
            for scene, each in zip(scenes, generators, strict=True)
        ]
        return {"ids": self._ids(texts), "labels": self._labels(scenes)}

    def _ids(self, texts: Sequence[str]) -> Tensor:
        """[B, length of the longest]: what comes after a text's end changes nothing before it."""
        ids = tokenise(self.tokenizer, [[text] for text in texts])[:, 0].long()
        used = (ids != self.tokenizer.eos_token_id).sum(1).max()  # padding is the end's token
        return ids[:, : int(used) + 1]

    def _labels(self, scenes: Sequence[AnyScene]) -> Tensor:
        labels = torch.zeros(len(scenes), self.labels.total)
        for row, scene in zip(labels, scenes, strict=True):
            row[self.labels.of(scene)] = 1
        return labels

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        named = self.naming(self.text_encoder(input_ids=batch["ids"]).pooler_output).float()
        weight = torch.full_like(named[:1, :1], self.rare)
        loss = F.binary_cross_entropy_with_logits(named, batch["labels"], pos_weight=weight, reduction="none")
        return loss.sum(1).mean() / 10, {}

    def evaluate(self) -> dict[str, float]:
        """Held-out scenes, told as in training and in words that are not: how often all kinds are named."""
        start = self.data.count
        numbered = [scene_of(self.mixed, self.data, start + k) for k in range(min(512, self.data.held_out))]
        pairs = [(scene, rng) for scene, rng in numbered if isinstance(scene, Scene)]
        usual = [captions.caption(scene, rng) for scene, rng in pairs]
        new = [captions.caption(scene, rng, new=True) for scene, rng in pairs]
        return {
            f"held_out_{name}": self._named([scene for scene, _ in pairs], texts)
            for name, texts in (("named", usual), ("named_in_new_words", new))
        }

    @torch.no_grad()
    def _named(self, scenes: Sequence[Scene], texts: Sequence[str]) -> float:
        """The share of texts whose likeliest kinds are those of their scenes."""
        right = []
        for rows in torch.split(torch.arange(len(texts)), 64):
            ids = self._ids([texts[i] for i in rows]).to(self.naming.weight.device)
            named = self.naming(self.text_encoder(input_ids=ids).pooler_output)[:, : self.labels.kinds]
            for i, scores in zip(rows.tolist(), named, strict=True):
                kinds = {kind_number(group) for group in scenes[i].groups}
                right.append(set(scores.topk(len(kinds)).indices.tolist()) == kinds)
        return sum(right) / len(right)

    def picture(self, folder: Path) -> Image.Image | None:
        return None

    def export(self, folder: Path) -> None:
        """text_encoder/, tokenizer/, words.txt and world.json, for a pipeline."""
        save_text_encoder(self.text_encoder, folder / "text_encoder")
        save_tokenizer(self.tokenizer, folder / "tokenizer")
        (folder / "words.txt").write_text("\n".join(known_words(survey(self.data))) + "\n", encoding="utf-8")
        world = self.mixed.world
        sprite_world(len(world.things), world.styles).write(folder / TABLE)


def survey(data: DataSection) -> list[str]:
    """Captions of the first scenes: what there is to be said."""
    mixed, texts = make_mixture(data), []
    for number in range(min(_SURVEY, data.count)):
        scene, rng = scene_of(mixed, data, number)
        texts.append(mixture.caption(scene, rng, data.reworded))
    return texts


def learn_vocabulary(data: DataSection, merges: int, length: int, folder: Path) -> None:
    """A tokenizer of the world's captions; every name of every thing is in it."""
    names = [
        name
        for thing in make_mixture(data).world.things
        for name in (thing.noun, thing.plural, *thing.also)
        if name
    ]
    train_vocabulary([*survey(data), *(20 * names)], merges, length, folder)


@torch.no_grad()
def new_text_encoder(
    config: dict[str, Any], tokenizer: CLIPTokenizer, old: tuple[CLIPTextModel, CLIPTokenizer] | None = None
) -> CLIPTextModel:
    """A CLIPTextModel for a tokenizer; what it shares with an old one (weights, tokenizer) comes from there.

    A token's embedding is that of the same token; of matrices of other sizes the common corner is taken.
    """
    text = fresh_text_encoder(config, tokenizer)
    if old is None:
        return text
    known, old_tokenizer = old
    into, tokens = text.state_dict(), text.get_input_embeddings().weight
    for name, value in known.state_dict().items():
        if name in into and "token_embedding" not in name:
            corner = tuple(slice(min(a, b)) for a, b in zip(value.shape, into[name].shape, strict=True))
            into[name][corner].copy_(value[corner])
    old_rows, old_tokens = old_tokenizer.get_vocab(), known.get_input_embeddings().weight
    for token, row in tokenizer.get_vocab().items():
        if token in old_rows:
            tokens[row] = old_tokens[old_rows[token]]
    return text
