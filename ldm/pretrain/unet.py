"""Training the denoiser: cached latents, captions as tokens, v- or eps-prediction.

The loss is the plain one of `ldm.train.loss`, weighted towards the cells that an object covers
(`object_weight`): backgrounds are learnt quickly, and they are most of a picture. A tenth of the captions are
dropped for classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598).

Beside it the U-Net may learn to say which thing of which colour is in each part of the picture, read off its
features where text has first met layout (`align`): a short cut to what aligning features gives (REPA, Yu et
al. 2025, arXiv 2410.06940), for a world that knows what it has drawn.

The noise may be what turns the picture into one of the same scene with its things in other colours
(`repainted`): what is seen in the noisy latents then says one colour and the text another, and the text is
right. Without that a U-Net learns to take colours from what it sees, and what it sees it pulls to the colours
that it knows of a kind.

The log's `caption_gap` is the held-out loss at t = 0.8 T with shuffled captions minus that with the right
ones: the early sign that pictures will follow their prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import ldm
from ldm.checkpoint import Defaults, Parts, load_text_encoder, load_tokenizer, save_folder
from ldm.checkpoint.folder import read_words
from ldm.checkpoint.io import read_config
from ldm.checkpoint.original.component import load_module
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.images.pixels import contact_sheet
from ldm.models import AutoencoderKL, AutoencoderTiny, UNet, build
from ldm.postcards.vocabulary import COLOURS, KINDS
from ldm.pretrain.alignment import Alignment
from ldm.pretrain.clip import pick_captions, tokenise
from ldm.pretrain.data import Pictures, cached, digest_of
from ldm.pretrain.vae import load_vae
from ldm.pretrain.widen import widen_latents
from ldm.prompts.tokenizer import CLIPTokenizer
from ldm.prompts.world import TABLE, read_world
from ldm.runtime import half_dtype, memory_format
from ldm.train.loss import (
    PLAIN_LOSS,
    Levels,
    denoising_losses,
    draw_noise,
    draw_timesteps,
    timestep_probabilities,
)
from ldm.train.loss_recipe import LossSection
from ldm.train.recipe import loss_settings
from ldm.train.task import Batch, Task


@dataclass(frozen=True)
class LatentDataset:
    """What the denoiser is trained on.

    latents: fp16 [N, c, h, w]; token_ids: int16 [N, captions, length]; weights: uint8 [N, h, w], 255 on
    objects; things: uint8 [N, h / 2, w / 2], which thing is there, 0 none; vae: a hash of the weights they
    are from; repainted: as latents, of the same scenes with their things in other colours; names_colours:
    bool [N, captions], which captions say all colours; kinds, paints: how many `things` tells apart.
    """

    latents: Tensor
    token_ids: Tensor
    weights: Tensor | None
    things: Tensor | None = None
    vae: str = ""
    repainted: Tensor | None = None
    names_colours: Tensor | None = None
    kinds: int = len(KINDS)
    paints: int = len(COLOURS)

    def __len__(self) -> int:
        return len(self.latents)

    def slice(self, part: slice) -> LatentDataset:
        """Some of the pictures, sharing memory."""
        cut: dict[str, Any] = {
            name: each[part] for name, each in vars(self).items() if isinstance(each, Tensor)
        }
        return replace(self, **cut)


@torch.no_grad()
def encode(pictures: Pictures, vae: AutoencoderKL | AutoencoderTiny, bf16: bool = True) -> Tensor:
    """Latents fp16 [N, c, h, w], made in bf16: four times as fast on a CPU that has it."""
    parts = []
    for index in torch.split(torch.arange(len(pictures)), 64):
        x = pictures.tensors(index).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            parts.append(vae.encode_latents(x).to(torch.float16))
    return torch.cat(parts).contiguous()


def prepare(
    pictures: Pictures, vae: AutoencoderKL | AutoencoderTiny, tokenizer: CLIPTokenizer, cache: Path
) -> LatentDataset:
    """Latents, token ids and object weights of `pictures`.

    Latents (of repainted pictures as well) and token ids are kept in `cache`, under a hash of the VAE or
    vocabulary and of 64 pictures with their captions, so that a changed model or data set is never read.
    """
    by_vocabulary, weights_hash = pictures.digest(), digest_of(vae)

    def latents_of(some: Pictures) -> Tensor:
        by_vae = some.digest()
        by_vae.update(weights_hash.encode())
        file = cache / f"latents-{len(some)}-{by_vae.hexdigest()[:12]}.npy"
        return cached(file, lambda: encode(some, vae))

    vocabulary = sorted(tokenizer.get_vocab().items())
    words = (vocabulary, tokenizer.model_max_length, pictures.captions[:: pictures.every])
    by_vocabulary.update(repr(words).encode())
    token_ids = cached(
        cache / f"tokens-{len(pictures)}-{by_vocabulary.hexdigest()[:12]}.npy",
        lambda: tokenise(tokenizer, pictures.captions),
    )
    again = pictures.repainted
    repainted = None if again is None else latents_of(replace(pictures, images=again))
    weights, things, named = (
        None if each is None else torch.from_numpy(each.copy())
        for each in (pictures.masks, pictures.things, pictures.names_colours)
    )
    return LatentDataset(latents_of(pictures), token_ids, weights, things, weights_hash, repainted, named)


def make_parts(model: Mapping[str, Any], vae: Path, clip: Path, init_from: Path | None) -> Parts:
    """The model to train: a U-Net as the recipe has it, of random weights, on what the other trainers made.

    Args:
        model: the recipe's section: unet, scheduler, defaults.
        vae: a folder of a VAE, or of a model; clip: a folder of text_encoder/, tokenizer/, words.txt.
        init_from: a model folder whose U-Net to go on from, on its own schedule, widened where the VAE is.

    Raises UserError where a folder holds another kind of module.
    """
    network, scheduler = load_vae(vae), model["scheduler"]
    unet = load_module(init_from / "unet", torch.float32) if init_from else build(model["unet"])
    if not isinstance(unet, UNet):
        raise UserError(f"{init_from}/unet holds a {type(unet).__name__}; give a model folder")
    if init_from:
        unet = widen_latents(unet, network.latent_channels)
        scheduler = read_config(init_from / "scheduler" / "scheduler_config.json")
    return Parts(
        unet=unet,
        vae=network,
        text_encoder=load_text_encoder(clip / "text_encoder", torch.float32),
        tokenizer=load_tokenizer(clip / "tokenizer"),
        scheduler=scheduler,
        defaults=Defaults(**model["defaults"]),
        words=read_words(clip / "words.txt"),
        world=read_world(clip / TABLE),
    )


class UNetTask(Task):
    """Trains a pipeline's U-Net and, at `text_lr` times its rate, the text encoder (0 freezes it).

    loss keys: object_weight; drop (share of captions dropped); text_lr; layout (share of the batch whose
    noise leaves only the layout to decide, t from 0.6 T; the others have any); align (weight of naming what
    is where from the features); repainted (share of the batch whose noise holds the scene in other colours;
    only of captions that say the right ones, and from t = 0.3 T: the error of v is that of x0 over
    sqrt(1 - a), so that below these samples would be most of the loss). The last two are left out where the
    pictures lack what they need: only postcards have it.
    """

    def __init__(
        self,
        parts: Parts,
        train: LatentDataset,
        held_out: LatentDataset,
        loss: dict[str, float],
        prompts: list[str],
    ) -> None:
        super().__init__()
        if parts.learns_variance:
            raise UserError(
                "variance_type learned_range is not trained from nothing: train with fixed_small, and then "
                "`ldm finetune --mode full --variance hybrid`"
            )
        self.parts, self.prompts = parts, prompts
        self.unet, self.text_encoder = parts.unet, parts.text_encoder
        self.schedule = Schedule.from_config(parts.scheduler)
        self.levels = Levels(self.schedule)
        self.train_set, self.held_out = train, held_out
        defaults = {"object_weight": 2.0, "drop": 0.1, "text_lr": 0.5, "layout": 0.0}
        defaults |= {"align": 0.0, "repainted": 0.0}
        self.weights = loss_settings(defaults, loss, shares=("drop", "layout", "repainted"))
        steps = len(self.schedule.alphas_cumprod)
        self.any_t = timestep_probabilities(PLAIN_LOSS, steps)
        self.early_t = timestep_probabilities(LossSection(min_timestep=int(0.6 * steps)), steps)
        self.text_encoder.requires_grad_(self.weights["text_lr"] > 0)
        self.empty_prompt = parts.tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]
        self.facts = {"model.vae": train.vae}
        known = train.things is not None  # not in a folder of somebody's pictures
        self.alignment = (
            Alignment(self.unet, train.kinds, train.paints) if self.weights["align"] and known else None
        )

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = [{"params": list(self.unet.parameters()), "lr": lr}]
        if self.alignment is not None:
            groups.append({"params": list(self.alignment.parameters()), "lr": lr})
        if self.weights["text_lr"] > 0:
            text = list(self.text_encoder.parameters())
            # Its embeddings are rows that are rarely seen, which Muon would pull as hard as the others.
            groups.append({"params": text, "lr": lr * self.weights["text_lr"], "muon": False})
        return groups

    def batch(self, rng: torch.Generator, size: int, number: int = 0) -> Batch:
        data = self.train_set
        index = torch.randint(len(data), (size,), generator=rng)
        ids, which = pick_captions(data.token_ids, index, rng)
        dropped = torch.rand(size, generator=rng) < self.weights["drop"]
        ids[dropped] = self.empty_prompt
        t, early = (draw_timesteps(each, size, rng) for each in (self.any_t, self.early_t))
        t = torch.where(torch.rand(size, generator=rng) < self.weights["layout"], early, t)
        batch = self._batch(data, index, ids, t, rng)
        if self.weights["repainted"] and data.repainted is not None and data.names_colours is not None:
            chosen = torch.rand(size, generator=rng) < self.weights["repainted"]
            chosen &= (
                data.names_colours[index, which]
                & ~dropped
                & (t >= int(0.3 * len(self.schedule.alphas_cumprod)))
            )
            # x0 + sigma noise' = other + sigma noise: the same noisy latents, but x0 to be found in them.
            scale = (chosen / self.schedule.sigma(t)).float()[:, None, None, None]
            batch["noise"] += scale * (data.repainted[index].float() - batch["x0"])
        return batch

    def _batch(
        self, data: LatentDataset, index: Tensor, ids: Tensor, t: Tensor, rng: torch.Generator
    ) -> Batch:
        x0 = data.latents[index].float()
        noise, _ = draw_noise(x0.shape, PLAIN_LOSS, rng)
        batch = {"x0": x0, "noise": noise, "t": t, "ids": ids}
        if data.weights is not None:
            batch["weight"] = 1 + self.weights["object_weight"] * data.weights[index].float() / 255
        if self.alignment is not None and data.things is not None:
            batch["things"] = data.things[index].long()
        return batch

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        losses, weight = self._pixel_losses(batch), batch.get("weight")
        extra = {"mse": losses.mean().detach()}
        loss = losses.mean() if weight is None else (losses * weight).sum() / weight.sum()
        if self.alignment is not None:
            gap = self.alignment(batch["things"])
            loss, extra["align"] = loss + self.weights["align"] * gap, gap.detach()
        return loss, extra

    def _pixel_losses(self, batch: Batch) -> Tensor:
        """Error of the output against its target, squared, mean over channels: [B, h, w]."""
        tokens = self.text_encoder(input_ids=batch["ids"]).last_hidden_state

        def predict(noisy: Tensor, t: Tensor) -> Tensor:
            layout = memory_format(noisy.device)
            output: Tensor = self.unet(noisy.contiguous(memory_format=layout), t, tokens)
            return output

        return denoising_losses(predict, batch["x0"], batch["noise"], batch["t"], self.levels)

    def evaluate(self) -> dict[str, float]:
        data, rng = self.held_out, torch.Generator().manual_seed(0)
        steps = len(self.schedule.alphas_cumprod)
        index = torch.arange(min(256, len(data)))
        ids = data.token_ids[index, 0].long()
        spread = torch.linspace(0, steps - 1, len(index)).long()
        figures = {"held_out_mse": self._mse(self._batch(data, index, ids, spread, rng))}
        right = self._batch(data, index, ids, torch.full_like(index, int(0.8 * steps)), rng)
        figures["caption_gap"] = self._mse(right | {"ids": ids.roll(1, 0)}) - self._mse(right)
        return figures

    def _mse(self, batch: Batch) -> float:
        device = next(self.parameters()).device
        total = 0.0
        for rows in torch.split(torch.arange(len(batch["x0"])), 64):
            part = {name: value[rows].to(device) for name, value in batch.items()}
            with torch.autocast(device.type, half_dtype(device)):
                total += float(self._pixel_losses(part).mean((1, 2)).sum())
        return total / len(batch["x0"])

    def export(self, folder: Path) -> None:
        save_folder(
            folder, replace(self.parts, unet=self.unet, text_encoder=self.text_encoder), torch.bfloat16
        )

    def picture(self, folder: Path) -> Image.Image:
        return contact_sheet(ldm.load(folder)(self.prompts, seed=0).images, columns=8)
