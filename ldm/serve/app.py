"""The application: all APIs behind one guard. FastAPI reads and describes, `service.py` does the work."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi import Request as Asked
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from ldm.errors import UserError
from ldm.request import Request
from ldm.serve.answers import error_body
from ldm.serve.front import page_router
from ldm.serve.guard import App, Guard, Rules
from ldm.serve.jobs_api import jobs_router, pictures_router, uploads_router
from ldm.serve.manual import manual
from ldm.serve.metrics import exposition
from ldm.serve.models import NoSuchModel
from ldm.serve.openai_api import openai_router
from ldm.serve.openai_orders import NAMES
from ldm.serve.queue import Closed, Full
from ldm.serve.sdapi.api import sdapi_router
from ldm.serve.sdapi.controlnet import controlnet_router
from ldm.serve.service import Service
from ldm.serve.ticket import internal_error
from ldm.version import __version__

A1111 = ("/sdapi/", "/controlnet/")


def create_app(service: Service, rules: Rules | None = None) -> App:
    """An ASGI application over a service, which it closes when it ends."""
    answers: Counter[str] = Counter()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    # No docs_url: FastAPI's pages fetch scripts from elsewhere.
    app = FastAPI(
        title="ldm", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    for make in (jobs_router, pictures_router, uploads_router, openai_router, sdapi_router):
        app.include_router(make(service))
    if service.shelf.control_dir is not None:
        app.include_router(controlnet_router(service))
    app.include_router(page_router())
    add_plain_routes(app, service, answers)
    add_errors(app)
    return Guard(app, rules or Rules(), answers)


def add_plain_routes(app: FastAPI, service: Service, answers: Counter[str]) -> None:
    """Health, metrics, and what describes the APIs."""

    @app.get("/healthz", tags=["server"], summary="Whether the server draws")
    def health() -> JSONResponse:
        """503 when a worker is gone."""
        alive = service.queue.is_alive
        waiting = len(service.queue.waiting)
        told = {"status": "ok" if alive else "stopped", "version": __version__, "waiting": waiting}
        return JSONResponse(told, 200 if alive else 503)

    @app.get("/metrics", tags=["server"], summary="Figures for Prometheus", response_class=PlainTextResponse)
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(exposition(service, answers), media_type="text/plain; version=0.0.4")

    @app.get("/openapi.json", include_in_schema=False)
    def openapi() -> JSONResponse:
        return JSONResponse(schema(app))

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(manual(schema(app)))


def schema(app: FastAPI) -> dict[str, Any]:
    """OpenAPI's description, with a Request's fields."""
    if app.openapi_schema is None:
        told = get_openapi(title=app.title, version=app.version, routes=app.routes)
        request = Request.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas = told.setdefault("components", {}).setdefault("schemas", {})
        schemas |= request.pop("$defs", {})
        schemas.setdefault("Request", request)
        app.openapi_schema = told
    return app.openapi_schema


def add_errors(app: FastAPI) -> None:
    """What went wrong, as `{"error": {message, type, param, code}}` with the status that says whose it is."""

    @app.exception_handler(UserError)
    async def users(asked: Asked, error: UserError) -> JSONResponse:
        if asked.url.path.startswith(A1111):
            absent = isinstance(error, NoSuchModel) or str(error).startswith("unknown sampler")
            return JSONResponse({"detail": str(error), "error": type(error).__name__}, 404 if absent else 422)
        if isinstance(error, NoSuchModel):
            return JSONResponse(error_body(str(error), 404, "model", "model_not_found"), 404)
        body = error_body(str(error))
        if asked.url.path.startswith("/v1/"):
            body["error"]["param"] = NAMES.get(body["error"]["param"], body["error"]["param"])
        return JSONResponse(body, 400)

    @app.exception_handler(Full)
    async def full(_: Asked, error: Full) -> JSONResponse:
        after = {"Retry-After": str(max(1, round(error.seconds)))}
        return JSONResponse(error_body(str(error), 429, code="queue_full"), 429, headers=after)

    @app.exception_handler(Closed)
    async def closed(_: Asked, error: Closed) -> JSONResponse:
        return JSONResponse(error_body(str(error), 503, code="stopping"), 503)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Asked, error: RequestValidationError) -> JSONResponse:
        first = next(iter(error.errors()), {"loc": (), "msg": "it cannot be read"})
        places = [str(each) for each in first["loc"] if each not in ("body", "query", "path")]
        name = ".".join(places) or "the body"
        param = places[0] if places and not places[0].isdecimal() else None
        return JSONResponse(error_body(f"{name} is not allowed: {first['msg']}", 400, param), 400)

    @app.exception_handler(HTTPException)
    async def plain(asked: Asked, error: HTTPException) -> JSONResponse:
        if asked.url.path.startswith(A1111):
            return JSONResponse({"detail": error.detail}, error.status_code, headers=error.headers)
        body = error_body(str(error.detail), error.status_code)
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def ours(_: Asked, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(internal_error(error), 500), 500)
