"""The page: the files of `page/`, read once. It is a client of the public API like any other."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

from ldm.serve.answers import missing

FOLDER = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
INDEX = "index.html"


def page_files() -> dict[str, Response]:
    """An answer for each file, by its name. `no-cache`: after an update no browser mixes old and new ones."""
    return {
        path.name: Response(
            path.read_bytes(), media_type=TYPES[path.suffix], headers={"cache-control": "no-cache"}
        )
        for path in sorted(FOLDER.iterdir())
        if path.suffix in TYPES
    }


def page_router() -> APIRouter:
    """`/`, and what it consists of under `/page`."""
    router, files = APIRouter(include_in_schema=False), page_files()

    @router.get("/")
    def page() -> Response:
        return files[INDEX]

    @router.get("/page/{name}")
    def file(name: str) -> Response:
        return files.get(name) or missing("file")

    return router
