"""What is trained, and what comes out: the U-Net, a LoRA beside its layers, a new word, a ControlNet,
an IP-Adapter.

What is trained is in fp32 and has gradients; all else is frozen, in the dtype that networks compute in.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ldm.adapters.image_prompt import ImageAdapter, cross_layers
from ldm.adapters.lora import FOLDER_FILES
from ldm.adapters.projections import ImageProjection
from ldm.checkpoint import Parts, save_folder, save_module
from ldm.checkpoint.beside.image_encoder import ImageEncoder
from ldm.checkpoint.original.component import dtype_of
from ldm.errors import UserError
from ldm.files import whole_folder
from ldm.finetune.inversion import add_word, save_word
from ldm.finetune.lora import add_lora
from ldm.finetune.lora_files import save_lora
from ldm.finetune.quantise import quantise
from ldm.finetune.recipe import FinetuneRecipe
from ldm.models.control import ControlNet
from ldm.runtime import Runtime

ADAPTER, TOKENS = "ip_adapter.safetensors", 4  # an IP-Adapter's file, and tokens that it makes of a picture
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
PARTS = ("unet", "vae", *TEXT_ENCODERS)
WIDTHS = (16, 32, 96, 256, 256, 256)  # of what makes features of a control picture; four for a VAE of 8


class Mode(Protocol):
    """One way to fine-tune. Each comes with the recipe it was made for."""

    @property
    def beside(self) -> Sequence[nn.Module]:
        """After `prepare`, what is trained beside the parts of the model."""
        return ()

    def prepare(self, parts: Parts, runtime: Runtime) -> Parts:
        """Parts on `runtime`'s device, ready to train and to draw with, of parts as they are stored."""

    def export(self, parts: Parts, folder: Path) -> None:
        """Write what was trained to `folder`, all of it or nothing."""

    def outputs(self, folder: Path) -> list[tuple[Path, str]]:
        """What `export` writes, and how it is used."""


def make_mode(recipe: FinetuneRecipe, captions: Iterable[str]) -> Mode:
    """The mode of a recipe; `captions` are those that will be trained on."""
    match recipe.mode:
        case "full":
            return FullMode(recipe.train_text_encoder, captions)
        case "lora":
            return LoraMode(recipe)
        case "controlnet":
            return ControlMode(recipe.seed)
        case "image_prompt":
            return ImagePromptMode(recipe)
        case _:
            return InversionMode(recipe, captions)


class FullMode(Mode):
    """All weights of the U-Net, and of the text encoders if they are trained; a pipeline folder comes out."""

    def __init__(self, text: bool, captions: Iterable[str]) -> None:
        self.parts = ("unet", *TEXT_ENCODERS) if text else ("unet",)
        self.words = frozenset(re.findall(r"[a-z']+", " ".join(captions).lower()))
        self.frozen: dict[str, Any] = {}

    def prepare(self, parts: Parts, runtime: Runtime) -> Parts:
        modules = {name: module for name in PARTS if (module := getattr(parts, name)) is not None}
        self.frozen = {name: module for name, module in modules.items() if name not in self.parts}
        parts = replace(parts, **{name: copy.deepcopy(module) for name, module in self.frozen.items()})
        trained = [modules[name] for name in self.parts if name in modules]
        for module in trained:
            # Copies: what is loaded in fp32 is mapped from its file.
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(runtime.device, torch.float32, copy=True)
        freeze(parts, runtime, trained)
        for module in trained:
            module.requires_grad_(True)
        freeze_unread(parts)
        return replace(parts, words=parts.words and parts.words | self.words)

    def export(self, parts: Parts, folder: Path) -> None:
        # In fp32, as it was trained: bf16 would round away what a small learning rate has changed. All else
        # goes out as it was stored: the copies that are drawn with may have been rounded.
        save_folder(folder, replace(parts, **self.frozen))

    def outputs(self, folder: Path) -> list[tuple[Path, str]]:
        return [(folder, f'txt2img --model {folder} -p "..."')]


class LoraMode(Mode):
    """LoRA, LoHa or LoKr beside the layers of the U-Net, and of the text encoders if they are trained."""

    def __init__(self, recipe: FinetuneRecipe) -> None:
        name = recipe.output_dir.resolve().name  # which other programs call the LoRA by
        self.recipe, self.name = recipe, "lora" if name == Path(FOLDER_FILES[0]).stem else name

    def prepare(self, parts: Parts, runtime: Runtime) -> Parts:
        recipe = self.recipe
        if recipe.base_model_precision != "no_change":
            parts = replace(parts, unet=quantise(parts.unet, runtime))
        freeze(parts, runtime)
        adapted = add_lora(
            parts,
            rank=recipe.rank,
            alpha=recipe.lora_alpha or recipe.rank,
            targets=recipe.lora_targets or None,
            conv=recipe.lora_conv,
            dropout=recipe.lora_dropout,
            use_dora=recipe.use_dora,
            kind=recipe.adapter_type,
            ranks=recipe.block_ranks,
            text=recipe.train_text_encoder,
            seed=recipe.seed,
        )
        freeze_unread(adapted)
        return adapted

    def export(self, parts: Parts, folder: Path) -> None:
        save_lora(parts, folder, self.name)

    def outputs(self, folder: Path) -> list[tuple[Path, str]]:
        ours, kohya = folder / "pytorch_lora_weights.safetensors", folder / f"{self.name}.safetensors"
        if self.recipe.adapter_type != "lora":
            return [
                (kohya, f'txt2img --lora {kohya} -p "..."; in the names of LyCORIS, for other programs too')
            ]
        return [
            (ours, f'txt2img --lora {folder} -p "..."; in diffusers pipe.load_lora_weights("{folder}")'),
            (kohya, "the same in kohya's names, for other programs"),
        ]


class InversionMode(Mode):
    """A new word: rows of the token embedding, everything else as it is."""

    def __init__(self, recipe: FinetuneRecipe, captions: Iterable[str]) -> None:
        self.recipe, self.word = recipe, recipe.placeholder_token or ""
        captions = list(captions)
        without = sum(self.word not in caption for caption in captions)
        if 0 < without < len(captions):
            text = f"{without} of {len(captions)} captions do not contain {self.word}: they teach it nothing"
            warnings.warn(text, stacklevel=2)
        if without == len(captions):
            raise UserError(
                f"no caption contains {self.word}: write it in the captions, or give one to all pictures "
                f'(--instance-prompt "a picture of {self.word}")'
            )

    def prepare(self, parts: Parts, runtime: Runtime) -> Parts:
        freeze(parts, runtime)
        first, vectors = self.recipe.initializer_token or "", self.recipe.num_vectors
        return add_word(parts, word=self.word, initial=first, vectors=vectors)

    def export(self, parts: Parts, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_word(parts, folder)

    def outputs(self, folder: Path) -> list[tuple[Path, str]]:
        file = folder / "learned_embeds.safetensors"
        return [(file, f'txt2img --embedding {file} -p "a picture of {self.word}"')]


class BesideMode(Mode):
    """A network beside a U-Net that stays as it is."""

    seed: int
    network: nn.Module  # after `prepare`

    @property
    def beside(self) -> Sequence[nn.Module]:
        return (self.network,)

    def begin(self, parts: Parts) -> nn.Module:
        """The network as it begins, of weights as they are stored; what is random in it is the seed's."""
        raise NotImplementedError

    def prepare(self, parts: Parts, runtime: Runtime) -> Parts:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.seed)
            network = self.begin(parts)  # before anything is rounded
        self.network = network.to(runtime.device, torch.float32)
        self.network.requires_grad_(True)
        freeze(parts, runtime)
        return parts


class ControlMode(BesideMode):
    """A ControlNet: it begins as a copy of the U-Net's way down."""

    network: ControlNet

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def begin(self, parts: Parts) -> ControlNet:
        widths = WIDTHS[: parts.vae.downscale.bit_length()]  # all but the first halve the control picture
        return ControlNet.from_unet(parts.unet, conditioning_embedding_out_channels=widths)

    def export(self, parts: Parts, folder: Path) -> None:
        with whole_folder(folder) as aside:
            save_module(self.network, aside)

    def outputs(self, folder: Path) -> list[tuple[Path, str]]:
        return [(folder, f'txt2img --control {folder},image=edges.png -p "..."')]


class ImagePromptMode(BesideMode):
    """An IP-Adapter, plain, of four tokens: its keys and values begin as those of the text."""

    network: ImageAdapter

    def __init__(self, recipe: FinetuneRecipe) -> None:
        self.seed, self.encoder = recipe.seed, ImageEncoder.find(Path(recipe.image_encoder or ""))

    def begin(self, parts: Parts) -> ImageAdapter:
        layers = cross_layers(parts.unet)
        projection = ImageProjection(self.encoder.projected, layers[0].dim, TOKENS)
        network = ImageAdapter(projection, layers)
        network.begin_as(parts.unet)
        return network

    def export(self, parts: Parts, folder: Path) -> None:
        with whole_folder(folder) as aside:
            self.network.save(aside / ADAPTER)

    def outputs(self, folder: Path) -> list[tuple[Path, str]]:
        file = folder / ADAPTER
        use = f"{file},image=ref.png,encoder={self.encoder.folder}"
        return [(file, f'txt2img --image-prompt {use} -p "..."')]


def freeze(parts: Parts, runtime: Runtime, but: Iterable[nn.Module] = ()) -> None:
    """Place the modules of `parts` as for drawing, but for some."""
    left = {id(module) for module in but}
    modules: dict[str, Any] = {name: getattr(parts, name) for name in PARTS}
    for name, module in modules.items():
        if module is not None and id(module) not in left:
            config = module.to_config() if name == "vae" else {}
            runtime.place(module, dtype_of(name, config, runtime))


def freeze_unread(parts: Parts) -> None:
    """Freeze what has no part in the output: several processes wait for the gradients of all that is trained.

    Of SDXL's first text encoder the last layer but one is read, without the final norm.
    """
    if parts.text_encoder is not None and parts.text_encoder_2 is not None:
        model = parts.text_encoder.text_model
        model.encoder.layers[-1].requires_grad_(False)
        model.final_layer_norm.requires_grad_(False)
