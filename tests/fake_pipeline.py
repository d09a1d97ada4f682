"""A pipeline for the tests of the command line that costs nothing, and what they share."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from ldm.images.pixels import to_tensor
from ldm.pipeline.job import Job, Picture
from ldm.pipeline.sample import Drawn
from ldm.prompts.world import World
from ldm.request import Request


class FakePipeline:
    """The interface that the command line uses; every seed gives other pixels."""

    name = "fake"
    vae = SimpleNamespace(latent_channels=4, downscale=8)
    runtime = SimpleNamespace(device=torch.device("cpu"))
    adapted = SimpleNamespace(reports=())

    model_hash = "0123456789"
    upscaler = refiner = safety_checker = None

    def __init__(self, fail_at=None, error=None):
        self.requests, self.steps, self.fail_at, self.error = [], 0, fail_at, error

    def resolve(self, request):
        defaults = {"height": 16, "width": 24, "num_inference_steps": 3, "guidance_scale": 7.0}
        absent = [name for name in defaults if getattr(request, name) is None]
        named = {"model": "fake", "model_hash": request.model_hash or self.model_hash}
        return request.replace(**named, **{name: defaults[name] for name in absent})

    def prepare(self, request, batch_size=1):
        asked = [request] if isinstance(request, Request) else request
        requests = tuple(self.resolve(each) for each in asked)
        pictures = [Picture(p, each, seed, seed) for p, each in enumerate(requests) for seed in each.seeds]
        batches = tuple(tuple(pictures[i : i + batch_size]) for i in range(0, len(pictures), batch_size))
        unused = dict.fromkeys(("encode", "sampler", "options", "guidance", "start"))
        grid = SimpleNamespace(timesteps=range(requests[0].num_inference_steps))
        return Job(model=self, requests=requests, batches=batches, grid=grid, **unused)

    def draw_batch(self, job, batch, on_step=lambda step: None):
        request = job.requests[batch[0].prompt].replace(seeds=tuple(picture.seed for picture in batch))
        self.requests.append(request)
        for i in range(request.num_inference_steps):
            self.steps += 1
            if self.steps == self.fail_at:
                raise self.error
            on_step(SimpleNamespace(i=i))
        return Drawn(to_tensor([self.draw(request, seed) for seed in request.seeds]), batch)

    def draw(self, request, seed):
        shape = (request.height, request.width, 3)
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))

    world = World(things=((("castle", "castles"),), (("boat", "boats"),)), words={"bark": "boat"})

    def unknown_words(self, prompt):
        return [word for word in prompt.split() if word in ("dragon", "castel")]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
