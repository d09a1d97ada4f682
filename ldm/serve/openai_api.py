"""OpenAI's image API under `/v1`, for the programs that speak it."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Body
from fastapi import Request as Asked
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile

from ldm.errors import UserError
from ldm.serve.answers import error_body
from ldm.serve.events import STREAM, changes, encoded, event, glimpse, until_over
from ldm.serve.guard import signed
from ldm.serve.openai_orders import USAGE, Order, edited, read_order
from ldm.serve.pictures import converted
from ldm.serve.service import Service
from ldm.serve.ticket import State, Ticket

VARIATION = 0.7  # strength
FILES = 16  # pictures that a form may hold: more than one is refused by name
OVER = {State.CANCELLED: 409, State.INTERRUPTED: 503}  # whose statuses are not 400 or 500


def openai_router(service: Service) -> APIRouter:
    """`/v1/images` and `/v1/models`."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    @router.get("/models", summary="Models that requests may name")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [model(name) for name in service.shelf.places]}

    @router.get("/models/{name}", summary="One of them")
    def one(name: str) -> dict[str, Any]:
        return model(service.shelf.name_of(name))

    @router.post("/images/generations", summary="Draw pictures")
    async def generate(asked: Asked, given: Annotated[dict[str, Any], Body()]) -> Response:
        """With `seed`, `negative_prompt`, `num_inference_steps`, `guidance_scale`, `sampler`, `spacing` and
        others of a Request beside OpenAI's fields.
        """
        if not isinstance(given.get("prompt"), str):
            raise UserError("prompt is not allowed to be left out: it must be a text")
        order = await run_in_threadpool(read_order, service, given, {})
        return await drawn(service, order, asked, "image_generation")

    @router.post("/images/edits", summary="Draw on a picture, where a mask is transparent")
    async def edit(asked: Asked) -> Response:
        """A form with `image` (or `image[]`, one), `mask` and `prompt`; without a mask and transparent parts
        of the picture, all of it is drawn anew, by `strength`.
        """
        fields, image, mask = await read_form(asked)
        own = await run_in_threadpool(edited, service, image, mask)
        order = await run_in_threadpool(read_order, service, fields, own)
        return await drawn(service, order, asked, "image_edit")

    @router.post("/images/variations", summary="Draw a picture otherwise")
    async def vary(asked: Asked) -> Response:
        """A form with `image`; OpenAI has retired it."""
        fields, image, _ = await read_form(asked)
        own = {"image": await run_in_threadpool(service.uploads.put, image), "strength": VARIATION}
        order = await run_in_threadpool(read_order, service, fields, own)
        return await drawn(service, order, asked, "image_variation")

    def model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": int(service.began), "owned_by": "ldm"}

    return router


async def read_form(asked: Asked) -> tuple[dict[str, Any], bytes, bytes | None]:
    """Fields, picture and mask of a form. Raises UserError."""
    if not asked.headers.get("content-type", "").startswith("multipart/form-data"):
        raise UserError("image is not allowed to be left out: send a multipart form with its file")
    async with asked.form(max_files=FILES, max_fields=100) as form:
        fields, files = dict[str, Any](), dict[str, list[bytes]]()
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                files.setdefault(name.removesuffix("[]"), []).append(await value.read())
            else:
                fields[name] = value
    images, masks = files.pop("image", []), files.pop("mask", [])
    for name in files:
        raise UserError(f"{name} is not allowed: this server takes image and mask as files")
    if len(images) != 1 or len(masks) > 1:
        name, count = ("image", len(images)) if len(images) != 1 else ("mask", len(masks))
        raise UserError(f"{name} is not allowed {count} times: this server draws from one picture")
    return fields, images[0], masks[0] if masks else None


async def drawn(service: Service, order: Order, asked: Asked, kind: str) -> Response:
    """The answer to an order, when it is drawn; or a stream that begins at once."""
    ticket = await run_in_threadpool(service.submit, order.request, order.model)
    if order.stream:
        return StreamingResponse(stream(service, order, ticket, kind), media_type=STREAM)
    await until_over(service.queue, ticket, asked)
    if ticket.state is not State.COMPLETED:
        status, body = failure(ticket)
        return JSONResponse(body, status)
    host = f"{asked.url.scheme}://{asked.headers.get('host', '')}"
    body = await run_in_threadpool(answer, service, order, ticket, host)
    return JSONResponse(body)


def answer(service: Service, order: Order, ticket: Ticket, host: str) -> dict[str, Any]:
    """An ImagesResponse. Each picture has its seed beside it, and whether a safety checker made it black."""
    data = list[dict[str, Any]]()
    for name, seed in zip(ticket.pictures, ticket.request.seeds, strict=True):
        if order.as_url:
            path = f"/api/pictures/{name}.{order.encoding.format}"
            data.append({"url": host + signed(service.secret, path), "seed": seed})
        else:
            data.append({"b64_json": picture(service, order, name), "seed": seed})
        if name in ticket.flagged:
            data[-1]["nsfw_content_detected"] = True
    return {
        "created": int(ticket.created),
        "data": data,
        **order.told,
        "size": size_of(service, ticket.pictures[0]),
        "usage": USAGE,
    }


def picture(service: Service, order: Order, name: str) -> str:
    """A finished picture in the order's format, as base64."""
    data = converted(service.path_of(name), order.encoding, service.store.marks)
    return base64.b64encode(data).decode()


def size_of(service: Service, name: str) -> str:
    kept = service.store.get(name)
    return "auto" if kept is None else f"{kept.width}x{kept.height}"


def failure(ticket: Ticket) -> tuple[int, Mapping[str, Any]]:
    """The status and body for a ticket that came to nothing."""
    status = OVER.get(ticket.state, 400 if ticket.is_users_fault else 500)
    return status, error_body(ticket.error or "it was not drawn", status)


async def stream(service: Service, order: Order, ticket: Ticket, kind: str) -> AsyncIterator[bytes]:
    """Server-sent events: some pictures on the way, evenly over the steps, then the finished ones."""
    sent = 0
    try:
        async for is_change in changes(ticket):
            if not is_change:
                yield b": still here\n\n"
                continue
            due = not ticket.is_over and sent < order.partials and ticket.progress > sent / order.partials
            part = await partial(order, ticket, sent, f"{kind}.partial_image") if due else None
            if part is not None:
                sent += 1
                yield part
        if ticket.state is not State.COMPLETED:
            yield event("error", failure(ticket)[1])
            return
        for name in ticket.pictures:
            data = await run_in_threadpool(picture, service, order, name)
            told = {**order.told, "size": size_of(service, name), "usage": USAGE}
            yield event(f"{kind}.completed", body_of(f"{kind}.completed", ticket, data) | told)
    finally:
        service.queue.cancel(ticket)  # whoever listened is gone; nothing to one that is over


async def partial(order: Order, ticket: Ticket, index: int, kind: str) -> bytes | None:
    """The event of what a ticket looks like now; None where nothing can be seen."""
    image = await glimpse(ticket)
    if image is None:
        return None
    data = await run_in_threadpool(encoded, image, order.encoding.format.upper())
    told = {**order.told, "size": f"{image.width}x{image.height}", "partial_image_index": index}
    return event(kind, body_of(kind, ticket, base64.b64encode(data).decode()) | told)


def body_of(kind: str, ticket: Ticket, data: str) -> dict[str, Any]:
    return {"type": kind, "created_at": int(ticket.started or time.time()), "b64_json": data}
