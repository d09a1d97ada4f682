"""What stands before every request: whose it is, where it comes from, how large it is, how slowly it comes.

A browser sends requests for any page that it shows. So a page elsewhere may neither ask this server
(`Origin`), nor make it look like its own (`Host`: DNS rebinding), unless the owner names it. Rebinding needs
a name: addresses of numbers are let through.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import logging
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from ldm.errors import printable
from ldm.serve.answers import error_body, json_bytes

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

LOCAL = ("localhost", "127.0.0.1", "::1")
OPEN = ("/healthz",)  # without a key
HELD = 8  # times the largest body: what all bodies take together
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
        b"object-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'self'",
    ),
)
log = logging.getLogger("ldm.serve")


@dataclass(frozen=True)
class Rules:
    """Who may ask. `origins` are pages elsewhere that may (CORS), `hosts` names beside the local ones."""

    key: str | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    body: int = 32 * 2**20  # bytes
    seconds: float = 60.0  # in which a body has to be there
    secret: bytes = b""  # of addresses that need no key

    def knows(self, header: str | None) -> bool:
        """Whether a key is right, in `Authorization: Bearer KEY` or basic with KEY as the password."""
        if self.key is None:
            return True
        way, _, given = (header or "").partition(" ")
        if way.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except (binascii.Error, ValueError):
                given = ""
        elif way.lower() != "bearer":
            given = ""
        # Of digests, so that not even the length of the key shows in the time.
        digests = [hashlib.sha256(each.strip().encode()).digest() for each in (given, self.key)]
        return hmac.compare_digest(*digests)

    def allows_host(self, host: str) -> bool:
        name = host_name(host)
        if name in LOCAL or name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def allows_origin(self, origin: str, host: str) -> bool:
        """Whether a page of this origin may ask: one of our own, or one that was named."""
        return origin in self.origins or origin.partition("://")[2] == host


def host_name(host: str) -> str:
    """A Host header without its port, in small letters."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.rpartition(":")[0] if name.count(":") == 1 else name


def signature(secret: bytes, path: str, until: int) -> str:
    return hmac.new(secret, f"{path}\n{until}".encode(), hashlib.sha256).hexdigest()


def signed(secret: bytes, path: str, seconds: float = 3600) -> str:
    """The path with a signature, by which it can be read for an hour without a key."""
    until = int(time.time() + seconds)
    return f"{path}?until={until}&signature={signature(secret, path, until)}"


class Refused(Exception):
    """A request that goes no further, with the status to answer."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


class Guard:
    """An ASGI application around another, which sees allowed requests only, with their bodies in memory."""

    def __init__(self, app: App, rules: Rules, counts: Counter[str]) -> None:
        self.app, self.rules, self.counts, self.held = app, rules, counts, 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): v.decode("latin-1") for name, v in scope["headers"]}
        answer = Answer(send, headers.get("origin"), self.rules)
        try:
            self.check(scope, headers)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await answer.plain(204, b"")
                return
            body = await self.read(headers, receive)
            try:
                await self.app(scope, replayed(body, receive), answer)
            finally:
                self.held -= len(body)
        except Refused as refused:
            headers_out = {name.replace("_", "-"): value for name, value in refused.headers.items()}
            await answer.plain(
                refused.status, json_bytes(error_body(refused.message, refused.status)), headers_out
            )
        finally:
            self.counts[str(answer.status)] += 1
            path = printable(scope["path"])[:200]  # without what is asked of it, which may be a prompt
            log.debug("%s %s %s", scope["method"], path, answer.status)

    def check(self, scope: MutableMapping[str, Any], headers: dict[str, str]) -> None:
        """Raises Refused."""
        rules, host, origin = self.rules, headers.get("host", ""), headers.get("origin")
        if not rules.allows_host(host):
            raise Refused(
                403, f"the host {printable(host)[:100]} is not this server's: name it by --allow-host"
            )
        if origin is not None and not rules.allows_origin(origin, host):
            raise Refused(
                403, f"pages of {printable(origin)[:100]} may not ask here: name that origin by --cors"
            )
        elsewhere = headers.get("sec-fetch-site") in ("cross-site", "same-site") and origin is None
        if elsewhere and (scope["method"] != "GET" or headers.get("sec-fetch-mode") != "navigate"):
            raise Refused(403, "pages elsewhere may not ask here")
        if scope["path"] in OPEN or scope["method"] == "OPTIONS" or self.is_signed(scope):
            return
        if not rules.knows(headers.get("authorization")):
            ways = 'Basic realm="ldm", Bearer realm="ldm"'
            raise Refused(
                401, "the key is missing or wrong: give Authorization: Bearer KEY", www_authenticate=ways
            )

    def is_signed(self, scope: MutableMapping[str, Any]) -> bool:
        """Whether an address says by itself that it may be read, and for how long."""
        query = scope.get("query_string", b"").decode("latin-1")
        values = dict(pair.partition("=")[::2] for pair in query.split("&"))
        until, given = values.get("until", ""), values.get("signature", "")
        if scope["method"] != "GET" or not until.isdecimal() or len(until) > 12 or int(until) < time.time():
            return False
        return hmac.compare_digest(
            signature(self.rules.secret, scope["path"], int(until)).encode(), given.encode()
        )

    async def read(self, headers: dict[str, str], receive: Receive) -> bytes:
        """The whole body. Raises Refused for one that is too large, before it is read, or too slow."""
        length, most = headers.get("content-length", "0"), self.rules.body
        if not length.isdecimal() or int(length) > most:
            raise Refused(
                413, f"the body is too large: this server takes at most {most} bytes", connection="close"
            )
        parts, size = list[bytes](), 0
        try:
            async with asyncio.timeout(self.rules.seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "the body ended early")
                    part, more = message.get("body", b""), message.get("more_body", False)
                    parts.append(part)
                    size, self.held = size + len(part), self.held + len(part)
                    if size > most or self.held > HELD * most:
                        status, why = (413, "too large") if size > most else (503, "one too many at once")
                        raise Refused(status, f"the body is {why}", connection="close")
        except (Refused, TimeoutError) as error:
            self.held -= size
            if isinstance(error, Refused):
                raise
            raise Refused(408, "the body came too slowly", connection="close") from None
        except BaseException:
            self.held -= size
            raise
        return b"".join(parts)


class Answer:
    """`send`, with the headers that every answer has."""

    def __init__(self, send: Send, origin: str | None, rules: Rules) -> None:
        self._send, self.status = send, 0
        self._more = [*HEADERS, (b"x-request-id", secrets.token_hex(8).encode())]
        if origin is not None and origin in rules.origins:
            allowed = {
                "access-control-allow-origin": origin,
                "access-control-allow-headers": "authorization, content-type",
                "access-control-allow-methods": "GET, POST, DELETE",
                "vary": "Origin",
            }
            self._more = [each for each in self._more if each[0] != b"cross-origin-resource-policy"]
            self._more += [(name.encode(), value.encode()) for name, value in allowed.items()]

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self._more]}
        await self._send(message)

    async def plain(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        own = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
        lines = [(name.encode(), value.encode()) for name, value in own.items()]
        await self({"type": "http.response.start", "status": status, "headers": lines})
        await self({"type": "http.response.body", "body": body})


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read, and then what comes after it."""
    left = [body]

    async def call() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return call
