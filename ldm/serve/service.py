"""What the APIs speak to: requests become tickets, tickets wait and are drawn, pictures are kept."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.errors import UserError, printable
from ldm.prompts.styles import Style, chosen, with_styles
from ldm.request import IMAGES, Request
from ldm.request.as_json import fields_of
from ldm.request.fields import short
from ldm.request.request import VERSION
from ldm.serve.drawing import Drawing, Saver
from ldm.serve.limits import Limits
from ldm.serve.models import Shelf
from ldm.serve.queue import CAPACITY, PICTURES, Queue
from ldm.serve.store import Store
from ldm.serve.ticket import State, Ticket, as_json
from ldm.serve.uploads import Uploads, decode_base64, is_data

# The pictures of a request beside its own two: those that networks are shown.
SHOWN = {"control": ("image", "mask"), "image_prompts": ("images", "masks")}
RECENT = 1000  # tickets that are over and still in memory
log = logging.getLogger("ldm.serve")


class Service:
    """A queue over shelves of models (one a device), with a store. Threads may share it.

    Args:
        batch: pictures that are drawn together at most, where memory allows.
        log_prompts: whether the log may say what was asked.
        styles: texts that requests may put around their prompts, by name.
    """

    def __init__(
        self,
        shelves: Sequence[Shelf],
        store: Store,
        limits: Limits | None = None,
        capacity: int = CAPACITY,
        batch: int = PICTURES,
        log_prompts: bool = False,
        styles: Mapping[str, Style] | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.shelves, self.store, self.log_prompts = tuple(shelves), store, log_prompts
        self.styles = dict(styles or {})
        self.uploads = Uploads(store.uploads, self.limits.pixels, self.limits.side)
        self.secret = secrets.token_bytes(32)  # for addresses that need no key
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0  # of drawing, over all tickets
        self.began = time.time()
        self._tickets: OrderedDict[str, Ticket] = OrderedDict()
        self._lock = threading.Lock()
        self._savers = [Saver(apart=True) for _ in shelves]
        draws = [
            Drawing(shelf, store.folder, store.keep, self.limits, batch, saver)
            for shelf, saver in zip(shelves, self._savers, strict=True)
        ]
        self.queue = Queue(draws, capacity, batch)

    @property
    def shelf(self) -> Shelf:
        """The first device's: all have the same models."""
        return self.shelves[0]

    def close(self) -> None:
        """Stop drawing; what waits is noted as interrupted."""
        self.queue.close()
        for saver in self._savers:
            saver.close()
        self.store.close()

    # --- asking ---

    def read(self, given: Mapping[str, Any], count: int = 1) -> tuple[Request, str]:
        """The request of a JSON object, with its model's name. Raises UserError, naming the field.

        `model` chooses one of the server's ("model/vae" with another VAE), `styles` of its styles; `image`
        and `mask_image` are ids of uploads or pictures, or data.
        """
        fields = self.dressed(fields_of(given, count))
        fields.setdefault("seeds", None)
        if fields["seeds"] is None:
            fields["seeds"] = fields_of({"seed": -1}, count)["seeds"]
        asked = fields.pop("model", None)
        if asked is not None and not isinstance(asked, str):
            raise UserError(f"model {short(asked)} is not allowed: it must be a name")
        for name in IMAGES:
            if (value := fields.get(name)) is not None:
                fields[name] = self.place(value, name)
        for name, own in SHOWN.items():
            fields |= self._placed(name, fields.get(name), own)
        for noted in ("model_hash", "safety_checker_sha256", "nsfw_content_detected"):
            fields.pop(noted, None)
        if fields.pop("version", None) not in (None, VERSION):
            raise UserError("version is not allowed here: the server draws by the rules of today")
        return Request(**fields), self.shelf.name_of(asked)

    def _placed(self, name: str, given: Any, own: tuple[str, ...]) -> dict[str, Any]:
        """The controls or image prompts of a request, with pictures of ours. Raises UserError."""
        uses = [given] if isinstance(given, Mapping) else given
        if not isinstance(uses, list) or not all(isinstance(use, Mapping) for use in uses):
            return {}  # a Request says what is wrong

        def place(value: Any, what: str) -> Any:
            if isinstance(value, list):
                return [self.place(each, what) for each in value]
            return self.place(value, what)

        shown = [{key: use[key] for key in own if use.get(key) is not None} for use in uses]
        placed = [{key: place(value, f"{name} {key}") for key, value in each.items()} for each in shown]
        return {name: [{**use, **each} for use, each in zip(uses, placed, strict=True)]}

    def dressed(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of a request with its `styles` around their prompts. Raises UserError."""
        names = fields.pop("styles", None) or []
        if not names:
            return fields
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"styles {short(names)} is not allowed: it must be a list of names")
        texts = fields.get("prompt") or "", fields.get("negative_prompt")
        prompt, negative = with_styles(*texts, chosen(self.styles, names, "the server"))
        return {**fields, "prompt": prompt, "negative_prompt": negative}

    def place(self, value: Any, what: str) -> str:
        """Where the image of a request lies, as pictures note it. Raises UserError for none of ours."""
        if isinstance(value, str):
            if is_data(value):
                return f"uploads/{self.uploads.put(decode_base64(value, what), what)}"
            name = value.removeprefix("uploads/")
            if self.uploads.place(name) is not None:
                return f"uploads/{name}"
            kept = self.store.get(value.rpartition("/")[2].removesuffix(".png"))
            if kept is not None:
                return kept.path.relative_to(self.store.folder).as_posix()
        raise UserError(
            f"{what} {short(value)} is not allowed: it must be the id of an upload (POST /api/uploads) or of "
            "a picture, or a data: URL of a PNG, JPEG or WebP; paths are not opened, addresses not fetched"
        )

    def submit(self, request: Request, model: str, source: str = "jobs") -> Ticket:
        """Let a request wait to be drawn. Raises UserError, and the queue's Full."""
        self.limits.check(request, self.shelf.loras, self.shelf.networks)
        if request.resize_mode == "latent" and request.image is not None:
            self._check_size(request.image)
        key = f"{model}\n{request.settings!r}"
        ticket = Ticket(request, model, source, key, on_over=self._over)
        self.store.note(ticket)
        try:
            self.queue.put(ticket)
        except BaseException:
            ticket.on_over = None
            ticket.end(State.CANCELLED, "the queue was full")
            self.store.note(ticket)
            self.counts["refused"] += 1
            raise
        with self._lock:
            self._tickets[ticket.id] = ticket
            self._forget()
        self.counts["jobs"] += 1
        return ticket

    def _check_size(self, place: str) -> None:
        """Raise UserError for an image too large to be encoded as it is."""
        with Image.open(self.store.folder / place) as image:
            if max(image.size) > self.limits.side:
                raise UserError(
                    f"image is not allowed beyond {self.limits.side} pixels a side with resize_mode latent, "
                    "which encodes all of it"
                )

    def _forget(self) -> None:
        """Drop the oldest tickets that are over: the store has them."""
        over = [name for name, ticket in self._tickets.items() if ticket.is_over]
        for name in over[: max(0, len(over) - RECENT)]:
            del self._tickets[name]

    def _over(self, ticket: Ticket) -> None:
        """Called once for each ticket that is over, from whichever thread."""
        try:
            self.store.note(ticket)
        except Exception as error:  # it is over all the same
            log.warning("job %s is not noted: %s", ticket.id, printable(error))
        seconds = 0.0 if ticket.started is None else (ticket.finished or 0) - ticket.started
        self.counts[ticket.state.value] += 1
        self.counts["pictures"] += len(ticket.pictures)
        self.seconds += seconds
        said = f" {printable(ticket.request.prompt)!r:.200}" if self.log_prompts else ""
        fault = f": {printable(ticket.error)}" if ticket.error and self.log_prompts else ""
        log.info(
            "job %s %s, %d pictures in %.2f s%s%s",
            ticket.id,
            ticket.state.value,
            len(ticket.pictures),
            seconds,
            said,
            fault,
        )

    # --- looking ---

    def ticket(self, name: str) -> Ticket | None:
        with self._lock:
            return self._tickets.get(name)

    def tell(self, name: str) -> dict[str, Any] | None:
        """What the API says of a job, now or before a restart; None for one that is not known."""
        ticket = self.ticket(name)
        return self.store.job(name) if ticket is None else self.as_json(ticket)

    def as_json(self, ticket: Ticket) -> dict[str, Any]:
        return as_json(ticket, self.queue.position(ticket))

    def jobs(self, limit: int) -> list[dict[str, Any]]:
        """The newest first."""
        return [self.tell(told["id"]) or told for told in self.store.jobs(limit)]

    def path_of(self, picture: str) -> Path:
        """Where a finished picture lies. Raises UserError if it was deleted."""
        kept = self.store.get(picture)
        if kept is None:
            raise UserError(f"the picture {picture!r:.120} is not there")
        return kept.path
