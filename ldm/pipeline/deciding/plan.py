"""What a drawing will take of memory, and in which way it fits: known before any weights are read.

    job -> stages (what is computed, with which weights there) -> a `Prediction` of each way -> which fits

A way changes how pictures are made and never which: all are exact up to the rounding of sums. What a stage
takes beside the weights is traced (`ldm.memory.trace`), so that it follows the code of the networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ldm.adapters.layers import share
from ldm.diffusion.guidance import CFG, InstructPix2Pix, text_of
from ldm.diffusion.guidances.chain import Chain
from ldm.errors import UserError
from ldm.kernels import packed
from ldm.memory import calls
from ldm.memory.calls import set_packs, set_sliced
from ldm.memory.residence import Sleeping, Stay, home_of, largest_layer
from ldm.memory.sizes import as_text
from ldm.memory.trace import peak_and_rest
from ldm.models import ControlNet
from ldm.pipeline.deciding.passes import Prepare
from ldm.pipeline.inputs import Inputs
from ldm.pipeline.start import Enlarge, FromImage
from ldm.runtime import resident_memory

if TYPE_CHECKING:
    from ldm.pipeline.job import Job
    from ldm.pipeline.model import Model

M = TypeVar("M", bound="Model")
# What kernels keep for themselves on a CPU once they have run (compiled code, buffers, threads), and holes
# that freed tensors leave: bytes, and a share of what a call takes (scripts/measure_memory.py).
KERNELS, HOLES = 30 << 20, 0.08
NETWORKS = ("text_encoder", "text_encoder_2", "unet", "vae")
ALL = (*NETWORKS, "control")


@dataclass(frozen=True)
class Way:
    """How networks are run, from the quickest to what takes least."""

    name: str
    bounded_vae: bool = False  # the VAE has what is left, and goes over bands where that is too little
    sliced: bool = False  # transformers take the rows of a batch one by one
    in_turn: bool = False  # the branches of guidance are called one after another
    stay: Stay = Stay.ALWAYS
    packs: bool = False  # copies of convolutions' weights are kept for kernels


WAYS = (
    Way("all in memory", packs=True),
    Way("VAE over bands", True),
    Way("attention by slices", True, True),
    Way("branches one by one", True, True, True),
    Way("networks while used", True, True, True, Stay.WHILE_USED),
    Way("layers while used", True, True, True, Stay.BY_LAYER),
)


@dataclass(frozen=True)
class Stage:
    """One thing that is computed."""

    name: str
    weights: int  # bytes that are in memory meanwhile
    beside: int  # bytes that the computing takes
    network: int = 0  # which computes it
    packed: int = 0  # bytes of what it takes that stay: weights packed for kernels


@dataclass(frozen=True)
class Prediction:
    """What a job takes in one way. Bytes: of this process, or of the card."""

    way: Way
    base: int  # what is there already, and is no weight of the job's: Python, torch and all that is imported
    stages: tuple[Stage, ...]
    budget: int | None  # what the VAE is given

    @property
    def worst(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.weights + stage.beside)

    @property
    def peak(self) -> int:
        return self.base + self.worst.weights + self.worst.beside


class Plan:
    """The ways in which a job can be drawn in `room` bytes, all in all; `prepare` is that of jobs."""

    def __init__(self, job: Job, room: int, prepare: Prepare) -> None:
        self.job, self.room = job, room
        self._traced: dict[tuple[Any, ...], tuple[int, int]] = {}
        self._jobs = list(_chain(job, prepare))

    @cached_property
    def models(self) -> list[Model]:
        """All whose weights are needed, each once."""
        found = {id(each.model.parts): each.model for each in self._jobs}
        upscaler = self.job.model.upscaler
        if upscaler is not None:
            found[id(upscaler.parts)] = upscaler
        return list(found.values())

    @cached_property
    def weights(self) -> dict[str, int]:
        """Bytes of the weights of each network; a tensor of several counts in the first."""
        seen: set[int] = set()
        found: dict[str, int] = {}
        for k, model in enumerate(self.models):
            for name in NETWORKS:
                if (module := getattr(model.parts, name)) is not None:
                    key = name if k == 0 else f"{name} of {model.name}"
                    found[key] = sum(each.nbytes for each in _tensors(module, seen))
        for name, network in self.controls.items():
            found[f"control {name}"] = sum(each.nbytes for each in _tensors(network, seen))
        return found

    @cached_property
    def controls(self) -> dict[str, nn.Module]:
        """The networks that show the U-Net pictures, by their files' names."""
        files = [control.file for job in self._jobs for control in job.controls]
        return {file.path.name: file.network for file in files}

    @cached_property
    def base(self) -> int:
        """Of this process without the job's weights; of a card nothing."""
        device = self.job.model.device
        shown = self._image_prompts
        beside = sum(each.nbytes for each in shown)
        if device.type == "cuda":
            return beside
        seen: set[int] = set()
        here = (each for module in self._modules(*ALL) for each in _tensors(module, seen))
        known = sum(each.nbytes for each in (*here, *shown) if _is_here(each)) + packed.nbytes()
        return resident_memory() - known + KERNELS + beside

    @cached_property
    def _image_prompts(self) -> list[Tensor]:
        """The weights of IP-Adapters, which stay; image encoders come and go before the first step."""
        told = (job.encode.pictures for job in self._jobs)
        parts = [part for each in told if each is not None for part in each.parts]
        seen: set[int] = set()
        return [tensor for part in parts for tensor in _tensors(part.file.network, seen)]

    def predict(self, way: Way) -> Prediction:
        """What the job takes in this way."""
        most = max(self._held(module, way) for module in self._modules("vae"))
        budget = max(0, self.room - self.base - most) if way.bounded_vae else None
        stages = [stage for job in self._jobs for stage in self._stages(job, way, budget)]
        kept: dict[int, int] = {}  # by network
        if len(self.job.batches) > 1:  # the second finds what the first has left
            kept = {stage.network: stage.packed for stage in stages}
        for k, stage in enumerate(stages):
            others = sum(size for network, size in kept.items() if network != stage.network)
            stages[k] = replace(stage, beside=stage.beside + others)
            kept[stage.network] = max(stage.packed, kept.get(stage.network, 0))
        return Prediction(way, self.base, tuple(stages), budget)

    def choose(self) -> Prediction:
        """The first way that fits. Raises UserError, with what it takes and what to change, if none does."""
        tried = []
        for way in WAYS:
            tried.append(self.predict(way))
            if tried[-1].peak <= self.room:
                return tried[-1]
        least = min(tried, key=lambda each: each.peak)
        request, size = self.job.request, len(self.job.batches[0])
        raise UserError(
            f"{size} picture{'s' * (size > 1)} of {request.width}x{request.height} would take "
            f"{as_text(tried[0].peak)} of memory, and at least {as_text(least.peak)} "
            f"({least.way.name}), but there is {as_text(self.room)}: {', or '.join(self.advice())}"
        )

    def advice(self) -> list[str]:
        """What would make the job smaller."""
        job, lines = self.job, []
        if len(job.batches[0]) > 1:
            lines.append("fewer pictures at once (--n-samples 1)")
        if job.model.dtype is torch.float32:
            lines.append("--dtype bf16, which halves weights")
        return [*lines, "a smaller --width and --height"]

    # --- stages ------------------------------------------------------------------------------------------

    def _stages(self, job: Job, way: Way, budget: int | None) -> Iterator[Stage]:
        model, batch = job.model, len(job.batches[0])
        height, width = job.request.size
        windows, texts = _texts_of(job)
        for name in ("text_encoder", "text_encoder_2"):
            encoder = getattr(model.parts, name)
            if encoder is not None:
                traced = self._trace(("text", id(encoder), texts), partial(calls.text, encoder, texts), model)
                yield Stage("text", self._held(encoder, way), traced[0])
        vae = model.vae
        if isinstance(job.start, FromImage) and not isinstance(job.start, Enlarge):
            yield self._vae_stage("VAE encode", model, 1, (height, width), way, budget)
        branches = 1 if way.in_turn else _branches(job)
        tile = job.request.tile_size if job.tiles is not None else None
        small = [min(side, tile or side) // vae.downscale for side in (height, width)]
        rows = batch * branches
        tokens = windows * (model.text.window if model.text.clips else calls.WINDOW)
        numbers = 5 if model.parts.requires_aesthetics_score else 6
        sliced = way.sliced and not job.looks_at_attention
        key = ("unet", id(model.unet), rows, *small, windows, sliced, way.packs)
        call = partial(calls.unet, model.unet, rows, small, tokens, numbers, sliced, way.packs)
        traced, name = self._trace(key, call, model), f"U-Net, {rows} x {small[0]} x {small[1]}"
        residuals = 0
        for control in job.controls:
            network = control.file.network
            if not isinstance(network, ControlNet):
                continue
            own = ("control", id(network), rows, *small, windows)
            beside = self._trace(
                own, partial(calls.unet, network, rows, small, tokens, numbers, False, True), model
            )
            residuals += 2 * rows * outputs_size(network, *small) * 4  # fp32: its own, and the sum of all
            shown = f"control {control.file.path.name}"
            yield Stage(shown, self._held(network, way), beside[0] + residuals, id(network), beside[1])
        yield Stage(name, self._held(model.unet, way), traced[0] + residuals, id(model.unet), traced[1])
        if job.then is None:
            yield self._vae_stage("VAE decode", model, batch, (height, width), way, budget)
            yield Stage("picture", self._held(vae, way), 5 * batch * 3 * 4 * height * width)

    def _vae_stage(
        self, name: str, model: Model, batch: int, size: tuple[int, int], way: Way, budget: int | None
    ) -> Stage:
        vae, held = model.vae, self._held(model.vae, way)
        free = max(0, self.room - self.base - held) if budget is None else budget
        over = vae.over_bands
        key = (name, id(vae), batch, size, free if budget is not None or over is None else over, way.packs)
        call = partial(calls.vae, vae, batch, size, free, way.packs, decode=name == "VAE decode")
        # Before the call pictures and latents are there in fp32, after it the same of its output.
        pictures = 3 * 4 * 3 * batch * size[0] * size[1]
        beside, stays = self._trace(key, call, model)
        return Stage(name, held, beside + pictures, id(vae), stays)

    def _trace(
        self, key: tuple[Any, ...], make: Callable[[], Callable[[], object]], model: Model
    ) -> tuple[int, int]:
        """Bytes that a call takes, and those of them that stay."""
        if key not in self._traced:
            self._traced[key] = peak_and_rest(make(), model.device)
        most, rest = self._traced[key]
        share = HOLES if model.device.type == "cpu" else 0
        return int((most - rest) * (1 + share)) + rest, rest

    def _held(self, module: nn.Module, way: Way) -> int:
        """Bytes of weights in memory while a network is used."""
        if way.stay is Stay.ALWAYS:
            return sum(self.weights.values())
        seen: set[int] = set()
        others = [each for other in self._modules(*ALL) for each in _tensors(other, seen)]
        always = sum(each.nbytes for each in others if not isinstance(each, Sleeping))
        own = [each for each in _tensors(module, set()) if isinstance(each, Sleeping)]
        by_layer = way.stay is Stay.BY_LAYER and not hasattr(module, "over_bands")
        return always + (largest_layer(module) if by_layer else sum(each.nbytes for each in own))

    def _modules(self, *names: str) -> Iterator[nn.Module]:
        for model in self.models:
            for name in names:
                if (module := getattr(model.parts, name, None)) is not None:
                    yield module
        if "control" in names:
            yield from self.controls.values()


def arranged(model: M, prediction: Prediction) -> M:
    """The model as a way wants it: it shares all tensors."""
    way, unet, vae = prediction.way, share(model.unet), share(model.vae)
    unet.in_turn, vae.budget = way.in_turn, prediction.budget
    set_sliced(unet, way.sliced)
    for network in (unet, vae):
        set_packs(network, way.packs)
    for name in NETWORKS:
        module = getattr(model.parts, name)
        if module is not None and (home := home_of(module)) is not None:
            # Bands read the weights of a VAE's layers without calling them: it comes as a whole.
            whole = way.stay is Stay.BY_LAYER and name == "vae"
            home.stay = Stay.WHILE_USED if whole else way.stay
    for beside in model.shelf.networks:
        if (home := home_of(beside)) is not None:
            home.stay = way.stay
    upscaler = None if model.upscaler is None else arranged(model.upscaler, prediction)
    refiner = None if model.refiner is None else arranged(model.refiner, prediction)
    parts = replace(model.parts, unet=unet, vae=vae)
    return replace(model, parts=parts, max_memory=None, upscaler=upscaler, refiner=refiner)


# --- what is called ----------------------------------------------------------------------------------------


def _chain(job: Job, prepare: Prepare) -> Iterator[Job]:
    """A job and those that go on from it; the upscaler's is like one that it would be asked for."""
    yield job
    if job.then is not None:
        yield from _chain(job.then.job, prepare)
    elif (upscaler := job.model.upscaler) is not None and job.request.upscaling is not None:
        height, width = job.request.size
        image = torch.zeros(3, height, width)
        asked = job.request.upscaling.replace(prompt="", seeds=(0,))
        yield prepare(replace(upscaler, max_memory=None), (asked,), Inputs(image=image))


def _branches(job: Job) -> int:
    """Rows that a picture has in a call of the U-Net: a row for each text that is told it."""
    guidance = job.guidance
    while (inner := getattr(guidance, "base", None)) is not None:
        guidance = inner
    composed = max(len(job.encode.shares(p)) for p in range(len(job.requests))) - 1
    composed += len(job.request.regions or ())
    asked = guidance.branches if isinstance(guidance, CFG | Chain | InstructPix2Pix) else ("uncond", "cond")
    texts = sum(text_of(name) == "cond" for name in asked)  # each is composed by itself
    times = 1 if job.steering.swap is None else 2  # with the picture that it was before
    return times * (len(asked) + composed * texts)


def _texts_of(job: Job) -> tuple[int, int]:
    """Windows of the longest prompt of a job; and rows that a text encoder reads at once."""
    windows = max(job.encode.length(p) for p in range(len(job.requests))) if job.model.text.clips else 1
    composed = max(len(job.encode.shares(p)) for p in range(len(job.requests)))
    return windows, windows * (composed + 1 + len(job.request.regions or ()))


def outputs_size(network: ControlNet, height: int, width: int) -> int:
    """Numbers of what a ControlNet adds for a row of latents of that size."""
    total, layers = 0, network.config.per_level("layers_per_block")
    for level, wide in enumerate(network.config.block_out_channels):
        total += wide * height * width * (layers[level] + 1)
        height, width = -(-height // 2), -(-width // 2)
    return total


# --- tensors -----------------------------------------------------------------------------------------------


def _tensors(module: nn.Module, seen: set[int]) -> Iterator[Tensor]:
    for each in (*module.parameters(), *module.buffers()):
        if id(each) not in seen:
            seen.add(id(each))
            yield each


def _is_here(tensor: Tensor) -> bool:
    """Whether a weight is in memory: not one that sleeps, nor pages of a file that may not be read yet."""
    if isinstance(tensor, Sleeping):
        return tensor.is_awake
    return getattr(tensor.untyped_storage(), "pages", None) is None
