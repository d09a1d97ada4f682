"""Our own API: jobs, their events, pictures, uploads, models."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query
from fastapi import Request as Asked
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, Response, StreamingResponse

from ldm.diffusion.samplers import SAMPLERS, SPACINGS
from ldm.images.enlarging import LABELS
from ldm.images.formats import Encoding
from ldm.request import Request
from ldm.serve.answers import missing
from ldm.serve.events import STREAM, changes, data_url, encoded, event, glimpse
from ldm.serve.pictures import Thumbnails, converted, told_request
from ldm.serve.service import Service
from ldm.serve.ticket import Ticket
from ldm.serve.uploads import FORMATS, decode_base64

# png, jpeg and webp, by the suffix of an upload.
KINDS = {suffix: kind.lower() for kind, suffix in FORMATS.items()}
PAGE = 50  # pictures or jobs
MOST = 500
AN_HOUR = {"cache-control": "private, max-age=3600"}
BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Request"}}},
    }
}


def jobs_router(service: Service) -> APIRouter:
    """`/api/jobs`."""
    router = APIRouter(prefix="/api/jobs", tags=["jobs"])

    @router.post("", status_code=202, summary="Ask for pictures: a Request as JSON", openapi_extra=BODY)
    def ask(given: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
        """Fields in any spelling that the command line takes; `n` pictures from `seed` on. `model` is a name
        of `/api/models`; `image` and `mask_image` are ids of uploads or pictures, or `data:` URLs.
        """
        count = given.pop("n", 1)
        request, model = service.read(given, service.limits.count(count))
        return service.as_json(service.submit(request, model))

    @router.get("", summary="The newest jobs")
    def jobs(limit: Annotated[int, Query(ge=1, le=MOST)] = PAGE) -> dict[str, Any]:
        return {"jobs": service.jobs(limit)}

    @router.get("/{job}", summary="How a job is", response_model=None)
    def job(job: str) -> dict[str, Any] | Response:
        """`status` is queued, generating, completed, failed, cancelled, or interrupted by a restart."""
        return service.tell(job) or missing("job")

    @router.post("/{job}/cancel", summary="Cancel a job that waits or is drawn", response_model=None)
    def cancel(job: str) -> dict[str, Any] | Response:
        ticket = service.ticket(job)
        if ticket is not None:
            service.queue.cancel(ticket)
        return service.tell(job) or missing("job")

    @router.get("/{job}/preview.webp", summary="What a job looks like now")
    async def preview(job: str) -> Response:
        """404 before its first step, and once it is over."""
        ticket = service.ticket(job)
        image = None if ticket is None else await glimpse(ticket)
        return missing("preview") if image is None else Response(encoded(image), media_type="image/webp")

    @router.get("/{job}/events", summary="A job's changes as server-sent events")
    async def events(job: str, preview: bool = False) -> Response:
        """`event: job` with the job at each change, the last when it is over; with `preview=true` a small
        picture of the step in it, as a `data:` URL.
        """
        ticket = service.ticket(job)
        if ticket is None:
            told = await run_in_threadpool(service.tell, job)
            return missing("job") if told is None else StreamingResponse(once(told), media_type=STREAM)
        return StreamingResponse(stream(service, ticket, preview), media_type=STREAM)

    return router


async def once(told: dict[str, Any]) -> AsyncIterator[bytes]:
    yield event("job", told)


async def stream(service: Service, ticket: Ticket, preview: bool) -> AsyncIterator[bytes]:
    async for is_change in changes(ticket):
        if not is_change:
            yield b": still here\n\n"
            continue
        told = service.as_json(ticket)
        if preview and not ticket.is_over and (image := await glimpse(ticket)) is not None:
            told["preview"] = data_url(encoded(image), "webp")
        yield event("job", told)


def pictures_router(service: Service) -> APIRouter:
    """`/api/pictures`."""
    router = APIRouter(prefix="/api/pictures", tags=["pictures"])
    thumbnails = Thumbnails(service.store.folder / "thumbnails", service.store.marks)

    @router.get("", summary="The gallery, the newest first")
    def pictures(
        limit: Annotated[int, Query(ge=1, le=MOST)] = PAGE,
        before: Annotated[str | None, Query(max_length=200)] = None,
        search: Annotated[str, Query(max_length=200)] = "",
    ) -> dict[str, Any]:
        """`next` is what to give as `before` for the next page; null at the end. `search` is in prompts."""
        found, after = service.store.page(limit, before, search)
        return {"pictures": [each.as_json() for each in found], "next": after}

    @router.get("/{picture}.{kind}", summary="A picture's file: png, jpeg or webp")
    def file(picture: str, kind: str) -> Response:
        """It says in its texts how it was drawn."""
        kept = service.store.get(picture)
        if kept is None or kind not in KINDS.values():
            return missing("picture")
        if kind == "png":
            return FileResponse(kept.path, media_type="image/png")
        return Response(converted(kept.path, Encoding(kind), service.store.marks), media_type=f"image/{kind}")

    @router.get("/{picture}/thumbnail", summary="A picture, small: WebP of at most 256 pixels a side")
    def thumbnail(picture: str) -> Response:
        kept = service.store.get(picture)
        if kept is None:
            return missing("picture")
        return FileResponse(thumbnails.of(kept.path), media_type="image/webp", headers=AN_HOUR)

    @router.get("/{picture}", summary="What a picture says of itself", response_model=None)
    def picture(picture: str) -> dict[str, Any] | Response:
        kept = service.store.get(picture)
        return missing("picture") if kept is None else kept.as_json()

    @router.delete("/{picture}", summary="Delete a picture")
    def delete(picture: str) -> Response:
        if not service.store.remove(picture):
            return missing("picture")
        thumbnails.remove(picture)
        return Response(status_code=204)

    return router


def uploads_router(service: Service) -> APIRouter:
    """`/api/uploads`, `/api/models` and `/api/limits`."""
    router = APIRouter(prefix="/api", tags=["pictures"])

    @router.post(
        "/uploads",
        status_code=201,
        summary="A picture to draw from",
        openapi_extra={"requestBody": {"content": {f"image/{kind}": {} for kind in KINDS.values()}}},
    )
    async def upload(asked: Asked) -> dict[str, Any]:
        """The body is the file; or JSON, `{"image": base64}`. `request` is how it was drawn, or null."""
        data = await asked.body()
        if asked.headers.get("content-type", "").startswith("application/json"):
            given = await asked.json()
            data = decode_base64(str(given.get("image", "") if isinstance(given, dict) else ""), "image")
        name = await run_in_threadpool(service.uploads.put, data)
        place = service.uploads.folder / name
        return {"id": name, "request": await run_in_threadpool(told_request, place)}

    @router.get("/uploads/{upload}", summary="A picture that was uploaded")
    def uploaded(upload: str) -> Response:
        place = service.uploads.place(upload)
        if place is None:
            return missing("upload")
        return FileResponse(place, media_type=f"image/{KINDS[place.suffix[1:]]}")

    @router.get("/models", summary="Models, LoRAs and networks that requests may name")
    def models() -> dict[str, Any]:
        shelf = service.shelf
        return {
            "default": shelf.default,
            "models": list(shelf.places),
            "loaded": list(shelf.loaded),
            "worlds": shelf.worlds,
            "loras": list(shelf.loras),
            "networks": list(shelf.networks),
            "vaes": list(shelf.vaes),
            "styles": list(service.styles),
        }

    @router.get("/limits", summary="What a request may ask for")
    def limits() -> dict[str, Any]:
        """Samplers and upscalers by their names, with those that people know them by."""
        return {
            **vars(service.limits),
            "queue": service.queue.capacity,
            "request": list(Request.model_fields),
            "samplers": {name: each.label for name, each in SAMPLERS.items()},
            "spacings": list(SPACINGS),
            "upscalers": dict(LABELS),
        }

    return router
