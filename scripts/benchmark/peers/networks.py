"""OpenVINO's networks in the place of a diffusers pipeline's modules: what the pipeline calls and asks."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from benchmark.inputs import config_of

if TYPE_CHECKING:
    from benchmark.peers.with_openvino import OpenedOpenVino


class Network:
    """A network that is compiled for the shapes that it is called with, and kept for the last of them."""

    def __init__(self, opened: OpenedOpenVino, part: str) -> None:
        self.opened, self.part = opened, part
        self.shapes: tuple[tuple[int, ...], ...] = ()
        self.found: Callable[..., Any] | None = None

    def compiled(self, *shapes: tuple[int, ...]) -> Callable[..., Any]:
        if self.found is None or shapes != self.shapes:
            self.found, self.shapes = self.opened.network(self.part, *shapes), shapes
        return self.found

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        call = self.compiled(*(tuple(each.shape) for each in inputs))
        outputs = call([each.numpy() for each in inputs], share_inputs=True, share_outputs=True)
        return [torch.from_numpy(outputs[k]).clone() for k in range(len(outputs))]


class Module(nn.Module):
    """What a pipeline asks of any module."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, opened: OpenedOpenVino, part: str) -> None:
        super().__init__()
        config = config_of(opened.case, part)
        if "_class_name" in config:  # with all that the class adds to its config
            with torch.device("meta"):
                self.config = getattr(diffusers, config["_class_name"]).from_config(config).config
        else:
            self.config = transformers.CLIPTextConfig(**config)


class UNet(Module):
    add_embedding: Any = None

    def __init__(self, opened: OpenedOpenVino) -> None:
        super().__init__(opened, "unet")
        self.compiled = (network := Network(opened, "unet")).compiled
        self.network = network
        # SDXL's pipeline looks here for the width of pooled text and sizes.
        width = self.config.get("projection_class_embeddings_input_dim")
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        **others: Any,
    ) -> tuple[Tensor, ...]:
        added = added_cond_kwargs or {}
        extra = [added[name] for name in ("text_embeds", "time_ids") if name in added]
        t = timestep.reshape(1).float()
        return (self.network(sample, t, encoder_hidden_states, *extra)[0],)


class Vae(Module):
    def __init__(self, opened: OpenedOpenVino) -> None:
        super().__init__(opened, "vae")
        self.decoder, self.encoder = Network(opened, "vae_decoder"), Network(opened, "vae_encoder")

    def decode(self, z: Tensor, **others: Any) -> tuple[Tensor, ...]:
        return (self.decoder(z)[0],)

    def encode(self, x: Tensor, **others: Any) -> Any:
        return SimpleNamespace(latents=self.encoder(x)[0])


class Encoded(tuple[Tensor, ...]):
    """First what pipelines take by [0], and for SDXL hidden states of which it takes the last but one."""

    hidden_states: tuple[Tensor, ...]


class TextEncoder(Module):
    def __init__(self, opened: OpenedOpenVino, part: str) -> None:
        super().__init__(opened, part)
        self.compiled = (network := Network(opened, part)).compiled
        self.network = network

    def forward(self, ids: Tensor, **others: Any) -> Encoded:
        first, penultimate = self.network(ids)
        encoded = Encoded((first, penultimate))
        encoded.hidden_states = (penultimate, first)
        return encoded
