"""A running server for tests of `ldm.serve`: the embedded model, uvicorn in a thread, few steps."""

import contextlib
import functools
import io
import threading
import time

import httpx2 as httpx
import uvicorn
from PIL import Image

import ldm
from ldm.serve.app import create_app
from ldm.serve.guard import Rules
from ldm.serve.models import Shelf
from ldm.serve.service import Service
from ldm.serve.store import Store

ASK = {"prompt": "a red house", "seed": 7, "steps": 2, "width": 64, "height": 64, "sampler": "euler"}


@functools.cache
def embedded():
    """The embedded model, read once for all servers: nothing changes it."""
    return ldm.load()


def shelf(folder=None, pipe=None, most=2):
    return Shelf(pipe or embedded(), ldm.load, folder, most)


@contextlib.contextmanager
def running(folder, rules=None, shelves=None, **options):
    """(an httpx client, the service) of a server on a free port."""
    service = Service(shelves or [shelf()], Store(folder), **options)
    config = uvicorn.Config(create_app(service, rules or Rules()), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client, service
    finally:
        server.should_exit = True
        thread.join()


def wait(client, job):
    """A job when it is over."""
    for _ in range(2000):
        told = client.get(f"/api/jobs/{job}").json()
        if told["status"] not in ("queued", "generating"):
            return told
        time.sleep(0.01)
    raise AssertionError(told)


def png(size=(64, 64), mode="RGB", kind="PNG", colour=None):
    data = io.BytesIO()
    Image.new(mode, size, colour or 0).save(data, format=kind)
    return data.getvalue()
