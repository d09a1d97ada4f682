"""The networks' boundary: casts to their dtype and memory layout are here and nowhere else.

State is fp32 on this side. What holds NaN or Inf is made again in fp32, or refused (`ldm.runtime.finite`).
The VAE works on the whole of all pictures where that fits into the free memory, else on less at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldm.control.controls import Control, Controls, Told, cast
from ldm.diffusion.deep_cache import DeepCache
from ldm.diffusion.guidance import Gradient, Predict, text_of
from ldm.diffusion.prediction import c_in
from ldm.diffusion.schedule import Grid
from ldm.diffusion.tiles import Tiles, Window
from ldm.memory.residence import in_use
from ldm.models import VAE, LatentClassifier, LatentDist, UNet, vae_bands
from ldm.models.attention import AnyText, Attend, Context, Meet, plainly
from ldm.models.conditioning import Conditioning
from ldm.models.encoder import NO_RESIDUALS, Residuals
from ldm.runtime import Finite, Runtime, finite, memory_format


@dataclass(frozen=True)
class Savings:
    """What the U-Net leaves out in a drawing, at a price (docs/fast.md).

    interval: of so many noise levels the deep features are computed at one. branch: the layer that they go
    on from (`UNet.from_deep`). merging: the share of tokens that self-attention merges.
    """

    interval: int = 1
    branch: int = 0
    merging: float = 0.0


EXACT = Savings()
Text = Callable[[torch.dtype], AnyText]
# (names of branches, which lie one below the other in a call, as many rows each; what they are told; what
# would be done) -> what is done in the place of `ldm.models.attention.attend`: the last itself for no change.
# One with a method `left_out`, (names, count of rows) -> a `LeftOut`, has transformer blocks left out too.
Attending = Callable[[tuple[str, ...], Conditioning, Attend], Attend]


class Beside(Protocol):
    """What sees attention, or changes it, in one drawing, and what the network answers with it."""

    def attending(self, names: tuple[str, ...], cond: Conditioning, base: Attend) -> Attend: ...

    def around(self, predict: Predict) -> Predict: ...


def predict(
    unet: UNet,
    grid: Grid,
    branches: Mapping[str, Conditioning],
    gradients: bool = False,
    tiles: Tiles | None = None,
    savings: Savings = EXACT,
    unread: list[Tensor] | None = None,
    attending: Sequence[Attending] = (),
    meet: Meet | None = None,
    controls: Sequence[Control] = (),
) -> Predict:
    """The U-Net's raw output, fp32, for the branches that a guidance asks for, in one call; or one for each
    of the windows that `tiles` cuts latents into.

    With `gradients` it can be differentiated in x, as likelihoods need it. With an interval in `savings` it
    is of one drawing, whose deep features it keeps. `unread` is as `Finite` has it. Of `attending` each goes
    around those before it. `controls` show pictures to the U-Net.
    """
    network = Finite(unet, "the U-Net", gradients, unread)
    beside = Controls(controls, unet, grid.sigmas, gradients, unread) if controls else None
    joined = dict[tuple[str, ...], Joined]()
    cache = None if savings.interval == 1 else DeepCache(savings.interval, grid.sigmas)

    def told(names: tuple[str, ...]) -> Joined:
        """What the branches are told now: a prompt may change over the steps."""
        parts = [branches[name] if name in branches else branches[text_of(name)] for name in names]
        keeps = not gradients and not is_compiled(unet)  # torch.compile would take each text for a constant
        if names not in joined or not joined[names].is_of(parts, keeps):
            joined[names] = Joined(names, parts, keeps, attending, meet)
        return joined[names]

    def outputs(x: Tensor, sigma: Tensor, names: tuple[str, ...], window: Window | None = None) -> Tensor:
        def within(joined: Joined) -> Conditioning:
            return joined.cond if window is None or tiles is None else _within(joined.cond, window, tiles)

        def shown(some: tuple[str, ...], dtype: torch.dtype) -> Told:
            sample, timestep, extra = _given(grid, x, sigma, within(told(some)), dtype)
            return sample, timestep, told(some).plain(dtype), extra

        now, chosen, deep, more = told(names), network, None, NO_RESIDUALS
        cond, active = within(now), () if beside is None else beside.active(sigma)
        keys = dict[Hashable, object]()
        if cache is not None:
            keys |= {(name, window, active): part for name, part in zip(names, now.parts, strict=True)}
            deep = cache.kept(keys, sigma)
        if beside is not None and active:
            count = None if deep is None else savings.branch + 1
            more = beside.residuals(sigma, names, len(x), window, count, shown)
            chosen = beside.unet(sigma) or network
        out = chosen(lambda unet: _unet(unet, grid, x, sigma, cond, now.text, savings, deep, more))
        if cache is not None and deep is None:
            cache.keep(keys, sigma, out[1])
        return out[0]

    def call(x: Tensor, sigma: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        if unet.in_turn and len(names) > 1:
            return {name: call(x, sigma, (name,))[name] for name in names}
        if tiles is None or tiles.is_whole(x):
            out = outputs(x, sigma, names)
        else:
            out = tiles.averaged(x, lambda window: outputs(window(x), sigma, names, window))
        return dict(zip(names, out.chunk(len(names)), strict=True))

    return call


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has made a module, or what it does, anew."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


class Joined:
    """What some branches of a drawing are told, one below the other, for all of its calls."""

    def __init__(
        self,
        names: tuple[str, ...],
        parts: Sequence[Conditioning],
        keeps: bool,
        attending: Sequence[Attending] = (),
        meet: Meet | None = None,
    ) -> None:
        """`keeps`: what layers make of the text is kept for the next call."""
        self.parts, self.cond, self.keeps = parts, Conditioning.cat(parts), keeps
        self._contexts, self._plain = dict[torch.dtype, Context](), dict[torch.dtype, Context]()
        attend: Attend = plainly
        for around in attending:
            attend = around(names, self.cond, attend)
        self.attend, self.meet = None if attend is plainly else attend, meet
        self.left_out = dict[str, list[slice]]()
        for around in attending:
            left_out = getattr(around, "left_out", None)
            if left_out is not None:
                for block, rows in left_out(names, len(self.cond)).items():
                    self.left_out[block] = [*self.left_out.get(block, []), *rows]

    def is_of(self, parts: Sequence[Conditioning], keeps: bool) -> bool:
        """Whether these very ones are joined here, in this way."""
        return self.keeps == keeps and all(a is b for a, b in zip(self.parts, parts, strict=True))

    def text(self, dtype: torch.dtype) -> AnyText:
        """The text as a network of that dtype reads it."""
        tokens = self.cond.tokens
        steers = self.attend, self.meet, self.left_out
        if not self.keeps:
            return Context(tokens.to(dtype), *steers) if any(steers) else tokens.to(dtype)
        if dtype not in self._contexts:
            self._contexts[dtype] = Context(tokens.to(dtype), *steers)
        return self._contexts[dtype]

    def plain(self, dtype: torch.dtype) -> AnyText:
        """The same for a network beside the U-Net, whose attention is its own."""
        if not any((self.attend, self.meet, self.left_out)):
            return self.text(dtype)
        if dtype not in self._plain:
            self._plain[dtype] = Context(self.cond.tokens.to(dtype))
        return self._plain[dtype] if self.keeps else self._plain[dtype].tokens


def _within(cond: Conditioning, window: Window, tiles: Tiles) -> Conditioning:
    """What the U-Net is told of a window of a picture: SDXL, that it looks like a crop from there.

    So the corner that `time_ids` tell moves to the window's, and where the size told is the picture's own,
    that becomes the window's. A refiner is told of no such size, but a score in its place.
    """
    concat = None if cond.concat is None else window(cond.concat)
    ids = cond.time_ids
    if ids is not None:
        ids = ids.clone()
        ids[:, 2] += window.top * tiles.downscale
        ids[:, 3] += window.left * tiles.downscale
        if ids.shape[1] == 6:
            own = (window.height * tiles.downscale, window.width * tiles.downscale)
            full = (window.full_height * tiles.downscale, window.full_width * tiles.downscale)
            for column, (is_own, is_full) in enumerate(zip(own, full, strict=True), start=4):
                ids[:, column].masked_fill_(ids[:, column] == is_full, is_own)
    return replace(cond, concat=concat, time_ids=ids)


def class_gradient(classifier: LatentClassifier, number: int) -> Gradient:
    """The gradient in x of ``log p(class | x, sigma)`` of an fp32 classifier's class of that number."""

    def gradient(x: Tensor, sigma: Tensor) -> Tensor:
        # Drawing may run in inference mode, whose tensors take no part in gradients: a copy does.
        with torch.inference_mode(False), torch.enable_grad():
            state = x.detach().clone(memory_format=memory_format(x.device)).requires_grad_()
            log_p = classifier(state, sigma).log_softmax(1)[:, number]
            (found,) = torch.autograd.grad(log_p.sum(), state)
        if not bool(found.isfinite().all()):
            raise FloatingPointError("the classifier gives NaN or Inf: its weights or its input are damaged")
        return found

    return gradient


def encode(vae: VAE, images: Tensor) -> LatentDist:
    """Images [B, 3, H, W] in 0..1 -> the Gaussian over latents that the VAE makes of them, fp32."""
    with in_use(vae) if hasattr(vae, "home") else nullcontext():  # loaded asleep
        mean, std = finite(vae, lambda vae: _encode(vae, images * 2 - 1), "the VAE's encoder")
    return LatentDist(mean, std).scaled(vae)


def decode(vae: VAE, latents: Tensor) -> Tensor:
    """Latents [B, c, h, w], as `encode` gives them -> images [B, 3, H, W] in 0..1, fp32."""
    with in_use(vae) if hasattr(vae, "home") else nullcontext():  # loaded asleep
        (images,) = finite(vae, lambda vae: (_decode(vae, latents),), "the VAE's decoder")
    return (images / 2 + 0.5).clamp(0, 1)


def _unet(
    unet: UNet,
    grid: Grid,
    x: Tensor,
    sigma: Tensor,
    cond: Conditioning,
    text: Text,
    savings: Savings,
    deep: Tensor | None = None,
    residuals: Residuals = NO_RESIDUALS,
) -> tuple[Tensor, ...]:
    """The output for all rows of `cond`, of which each picture of `x` has as many; with an interval in
    `savings` deep features too, `deep` or new ones.
    """
    dtype = unet.conv_in.weight.dtype
    context, (sample, timestep, extra) = text(dtype), _given(grid, x, sigma, cond, dtype)
    given, more = (sample, timestep, context), residuals
    if residuals is not NO_RESIDUALS:
        more = cast(residuals, dtype)
    if savings.interval == 1:
        return (unet(*given, **extra, merging=savings.merging, residuals=more),)
    deep = None if deep is None else deep.to(dtype)
    return unet.from_deep(*given, savings.branch, deep, savings.merging, more, **extra)


def _given(
    grid: Grid, x: Tensor, sigma: Tensor, cond: Conditioning, dtype: torch.dtype
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Sample, timestep, and what is extra beside the text, as networks of a dtype take them.

    All conditioning is cast too, but for sizes and noise levels, which 16 bits cannot hold.
    """
    timestep = grid.t(sigma)
    sample = (x * c_in(sigma)).repeat(len(cond) // len(x), 1, 1, 1)
    if cond.concat is not None:
        sample = torch.cat([sample, cond.concat], dim=1)
    extra: dict[str, Any] = {
        "pooled": None if cond.pooled is None else cond.pooled.to(dtype),
        "time_ids": cond.time_ids,
        "class_labels": cond.class_labels,
        "timestep_cond": None if cond.timestep_cond is None else cond.timestep_cond.to(dtype),
    }
    return (
        sample.to(dtype, memory_format=memory_format(sample.device)),
        # A tensor, as torch.compile takes a number for a constant and compiles again for each; filled there,
        # as copying it would make the host wait for a card.
        torch.full((), float(timestep), dtype=torch.float32, device=sample.device),
        extra,
    )


def _encode(vae: VAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, c, h, w], unscaled."""
    latents = vae_bands.encode(vae, *_as_taken(vae, images))
    return latents.mean, latents.std


def _decode(vae: VAE, latents: Tensor) -> Tensor:
    return vae_bands.decode(vae, *_as_taken(vae, latents))


def _as_taken(vae: VAE, x: Tensor) -> tuple[Tensor, int]:
    """Images or latents where the VAE is, in its dtype and layout; the bytes that are free there."""
    weight = next(vae.parameters())
    taken = x.to(weight.device, weight.dtype, memory_format=memory_format(weight.device))
    free = Runtime(weight.device, weight.dtype).free_memory
    return taken, free if vae.budget is None else min(free, vae.budget)
