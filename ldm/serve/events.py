"""Tickets, which threads change, seen from the event loop: their changes, and server-sent events."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from fastapi import Request as Asked
from fastapi.concurrency import run_in_threadpool

from ldm.serve.queue import Queue
from ldm.serve.ticket import Ticket

if TYPE_CHECKING:
    from PIL.Image import Image

BEAT = 15.0  # seconds after which a silent stream says that it is alive
STREAM = "text/event-stream"
LOOK = 1.0  # seconds between looks whether a client still waits


async def changes(ticket: Ticket, every: float = BEAT) -> AsyncIterator[bool]:
    """True at once and after each change (several quick ones are one), to the last; False after `every` s."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def tell() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there to be told
            loop.call_soon_threadsafe(changed.set)

    stop = ticket.watch(tell)
    try:
        while True:
            over = ticket.is_over
            yield True
            if over:
                return
            while True:
                try:
                    await asyncio.wait_for(changed.wait(), every)
                    break
                except TimeoutError:
                    yield False
            changed.clear()
    finally:
        stop()


async def until_over(queue: Queue, ticket: Ticket, asked: Asked) -> None:
    """Wait for a ticket; if whoever asked goes away, it is cancelled."""
    over = False
    try:
        async for _ in changes(ticket, LOOK):
            if await asked.is_disconnected():
                return
        over = True
    finally:
        if not over:
            queue.cancel(ticket)


def event(name: str, data: Mapping[str, Any]) -> bytes:
    """One server-sent event (HTML Living Standard, 9.2)."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


async def glimpse(ticket: Ticket) -> Image | None:
    """What a ticket looks like now, a small picture; None where nothing can be seen."""
    look = ticket.glimpse
    if look is None:
        return None
    try:
        return await run_in_threadpool(look)
    except (FloatingPointError, ValueError):  # of 16 bits, on the way
        return None


def encoded(image: Image, kind: str = "WEBP") -> bytes:
    """The bytes of a preview."""
    data = io.BytesIO()
    image.save(data, format=kind)
    return data.getvalue()


def data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
