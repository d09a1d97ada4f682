"""`/sdapi/v1`: txt2img, img2img, progress, options, lists."""

from __future__ import annotations

import base64
import json
import time
from typing import Annotated, Any

from fastapi import APIRouter, Body
from fastapi import Request as Asked
from fastapi.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import UserError
from ldm.images.formats import PARAMETERS
from ldm.images.texts import read_texts
from ldm.request import Request
from ldm.runtime import resident_memory
from ldm.serve.events import encoded, glimpse, until_over
from ldm.serve.models import WITH
from ldm.serve.sdapi import lists
from ldm.serve.sdapi.asked import Drawing, read_drawing
from ldm.serve.sdapi.extras import extra
from ldm.serve.service import Service
from ldm.serve.ticket import State, Ticket
from ldm.serve.uploads import decode_base64
from ldm.version import __version__

Given = Annotated[dict[str, Any], Body()]
KEPT = (State.COMPLETED, State.CANCELLED)  # an interrupted drawing gives what is finished


class Sdapi:
    """What this API remembers beside the service: options, and which tickets are its own."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.options = {**lists.OPTIONS, "sd_model_checkpoint": service.shelf.default}

    async def draw(self, asked: Asked, given: dict[str, Any], is_img2img: bool) -> dict[str, Any]:
        """Draw, and answer when it is done."""
        service = self.service
        drawing = await run_in_threadpool(read_drawing, service, given, self.options, is_img2img)
        ticket = await run_in_threadpool(service.submit, drawing.request, drawing.model, "sdapi")
        await until_over(service.queue, ticket, asked)
        if ticket.state not in KEPT:
            raise HTTPException(422 if ticket.is_users_fault else 500, ticket.error)
        return await run_in_threadpool(self.answer, drawing, ticket, given)

    def answer(self, drawing: Drawing, ticket: Ticket, given: dict[str, Any]) -> dict[str, Any]:
        paths = [self.service.path_of(name) for name in ticket.pictures]
        texts = [read_texts(path)[PARAMETERS] for path in paths]
        kept = self.service.store.get(ticket.pictures[0]) if paths else None
        request = Request(**kept.request) if kept is not None and kept.request else drawing.request
        images = [base64.b64encode(path.read_bytes()).decode() for path in paths]
        # What holds pictures is not said back.
        heavy: dict[str, Any] = {"init_images": None, "mask": None, "alwayson_scripts": {}}
        return {
            "images": images if drawing.sends_images else [],
            "parameters": {name: heavy.get(name, value) for name, value in given.items()},
            "info": json.dumps(info_of(request, ticket, texts, drawing.batch_size, drawing.styles)),
        }

    @property
    def own(self) -> list[Ticket]:
        """Of this API, those that wait or are drawn."""
        queue = self.service.queue
        return [each for each in (*queue.drawing, *queue.waiting) if each.source == "sdapi"]

    def interrupt(self) -> dict[str, Any]:
        """Stop what this API draws now; what others draw goes on."""
        for ticket in self.own:
            if ticket.state is State.GENERATING:
                self.service.queue.cancel(ticket)
        return {}

    async def progress(self, skip_current_image: bool) -> dict[str, Any]:
        """`progress` and `job_count` are 0 only when nothing waits and nothing is drawn."""
        own = self.own
        first = next((each for each in own if each.state is State.GENERATING), None)
        image = None if first is None or skip_current_image else await glimpse(first)
        shown = None if image is None else base64.b64encode(await run_in_threadpool(encoded, image, "PNG"))
        return {
            "progress": 0.0 if not own else max(0.001, 0.0 if first is None else min(first.progress, 0.999)),
            "eta_relative": 0.0 if first is None else first.eta or 0.0,
            "state": {
                "skipped": False,
                "interrupted": False,
                "stopping_generation": False,
                "job": "" if first is None else first.id,
                "job_count": len(own),
                "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
                "job_no": 0,
                "sampling_step": 0 if first is None else first.step,
                "sampling_steps": 0 if first is None else first.steps,
            },
            "current_image": None if shown is None else shown.decode(),
            "textinfo": None,
        }


def info_of(
    request: Request, ticket: Ticket, texts: list[str], batch_size: int, styles: list[str]
) -> dict[str, Any]:
    """What `info` holds, as a string of JSON."""
    seeds, count = list(ticket.request.seeds[: len(texts)]), len(texts)
    subseed = request.variation_seed or 0
    negative, resize = request.negative_prompt or "", request.seed_resize or (-1, -1)
    sampler = SAMPLERS.get(request.sampler or "")
    return {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * count,
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * count,
        "seed": ticket.request.seeds[0],
        "all_seeds": seeds,
        "subseed": subseed,
        "all_subseeds": [subseed] * count,
        "subseed_strength": request.variation_strength or 0.0,
        "width": request.width,
        "height": request.height,
        "sampler_name": request.sampler if sampler is None else sampler.label,
        "cfg_scale": request.guidance_scale,
        "steps": request.num_inference_steps,
        "batch_size": batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": request.model or ticket.model,
        "sd_model_hash": request.model_hash or "",
        "sd_vae_name": ticket.model.partition(WITH)[2] or None,
        "sd_vae_hash": None,
        "seed_resize_from_w": resize[1],
        "seed_resize_from_h": resize[0],
        "denoising_strength": request.hires.strength if request.hires else request.strength,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": styles,
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(ticket.created)),
        "clip_skip": (request.clip_skip or 0) + 1,
        "is_using_inpainting_conditioning": False,
        "version": f"ldm {__version__}",
    }


def sdapi_router(service: Service) -> APIRouter:
    """`/sdapi/v1`."""
    router, api = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"]), Sdapi(service)

    @router.post("/txt2img", summary="Draw pictures")
    async def txt2img(asked: Asked, given: Given) -> dict[str, Any]:
        return await api.draw(asked, given, False)

    @router.post("/img2img", summary="Draw on a picture")
    async def img2img(asked: Asked, given: Given) -> dict[str, Any]:
        return await api.draw(asked, given, True)

    @router.get("/progress", summary="How what is drawn comes on")
    async def progress(skip_current_image: bool = False) -> dict[str, Any]:
        return await api.progress(skip_current_image)

    @router.post("/interrupt", summary="Stop what is drawn")
    @router.post("/skip", summary="Stop what is drawn")
    def interrupt() -> dict[str, Any]:
        return api.interrupt()

    @router.get("/options", summary="The server's settings")
    def options() -> dict[str, Any]:
        return api.options

    @router.post("/options", summary="Change some")
    def change(given: Given) -> None:
        api.options = lists.changed_options(service, api.options, given)

    @router.post("/png-info", summary="How a picture was drawn")
    def png_info(given: Given) -> dict[str, Any]:
        data = decode_base64(str(given.get("image", "")), "image")
        texts = read_texts(service.uploads.folder / service.uploads.put(data))
        return {"info": texts.get(PARAMETERS, ""), "items": texts, "parameters": {}}

    add_extras(router, service)
    add_lists(router, service)
    return router


def add_extras(router: APIRouter, service: Service) -> None:
    """Pictures made larger."""

    @router.post("/extra-single-image", summary="A picture, larger")
    def single(given: Given) -> dict[str, Any]:
        return {"image": extra(service, given, given.get("image")), "html_info": ""}

    @router.post("/extra-batch-images", summary="Pictures, larger")
    def several(given: Given) -> dict[str, Any]:
        images = given.get("imageList")
        if not isinstance(images, list) or not all(isinstance(each, dict) for each in images):
            raise UserError("imageList is not allowed: it must be a list of {data, name}")
        service.limits.count(len(images), "imageList")
        return {"images": [extra(service, given, each.get("data")) for each in images], "html_info": ""}


def add_lists(router: APIRouter, service: Service) -> None:
    """What never changes anything."""
    answers: dict[str, Any] = {
        "samplers": lists.samplers,
        "schedulers": lists.schedulers,
        "sd-models": lambda: lists.models(service),
        "sd-vae": lambda: lists.vaes(service),
        "prompt-styles": lambda: lists.styles(service),
        "loras": lambda: lists.loras(service),
        "upscalers": lists.upscalers,
        "latent-upscale-modes": lists.latent_upscale_modes,
        "embeddings": lambda: {"loaded": {}, "skipped": {}},
        "scripts": lambda: lists.scripts(service),
        "cmd-flags": empty,
        "memory": lambda: {"ram": {"used": resident_memory()}, "cuda": {}},
    }
    nothing = ("script-info", "hypernetworks", "face-restorers")
    answers |= dict.fromkeys((*nothing, "realesrgan-models"), none)
    for name, answer in answers.items():
        router.add_api_route(f"/{name}", answer, methods=["GET"], response_model=None, summary=name)
    router.add_api_route("/interrogate", interrogate, methods=["POST"], summary="Not here: 422")
    for name in ("refresh-checkpoints", "refresh-loras", "refresh-vae"):
        router.add_api_route(f"/{name}", empty, methods=["POST"], response_model=None, summary=name)


def interrogate() -> None:
    """What AUTOMATIC1111 does by BLIP and DeepDanbooru."""
    raise UserError("interrogate is not here: this server has no model that describes pictures")


def empty() -> dict[str, Any]:
    return {}


def none() -> list[Any]:
    return []
