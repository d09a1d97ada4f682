"""What a worker does with tickets: a model, a job, its batches; pictures are kept as they are finished."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.errors import UserError
from ldm.images.pixels import to_pil
from ldm.pipeline.deciding.prepare import prepare
from ldm.pipeline.job import Batch, Job, Picture
from ldm.pipeline.sample import draw_batch
from ldm.request import IMAGES, Request
from ldm.request.uses import DEPTH
from ldm.runtime import is_out_of_memory
from ldm.serve.limits import Limits
from ldm.serve.models import Loaded, Preview, Shelf
from ldm.serve.ticket import State, Ticket, internal_error
from ldm.spelling import unknown

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.diffusion.solvers import Step

Keep = Callable[[Ticket, "Image", Request], str]  # a finished picture -> its id
log = logging.getLogger("ldm.serve")


class NobodyWaits(Exception):
    """All tickets of a batch were cancelled: it stops at its step."""


@dataclass(frozen=True, eq=False)
class Drawing:
    """Draws tickets that are alike. Raises nothing for what goes wrong with one: that ends the ticket.

    Args:
        model: gives the model of a name that the server has, and says where networks lie; raises UserError.
        root: the folder beneath which the images of requests lie.
        keep: is given each finished picture with the request that draws it alone.
        most: pictures of a batch; memory may make it fewer.
        saver: keeps pictures in a thread of its own, while the next ones are drawn.
    """

    model: Shelf
    root: Path
    keep: Keep
    limits: Limits
    most: int
    saver: Saver = field(default_factory=lambda: Saver())

    def __call__(self, tickets: Sequence[Ticket]) -> None:
        try:
            model = self.model(tickets[0].model)
        except Exception as error:
            for ticket in tickets:
                fail(ticket, error)
            return
        self._draw(model, tickets)

    def _draw(self, model: Loaded, tickets: Sequence[Ticket]) -> None:
        networks: Mapping[str, Path] = self.model.networks
        if model.pipe.controls.takes_depth:
            networks = {**networks, DEPTH: Path(DEPTH)}  # no file: an input of the model
        try:
            requests = [located(ticket.request, self.root, networks) for ticket in tickets]
            job = prepare(model.pipe, requests, batch_size=self.most)
            self.limits.check_bounds(job.request)
        except Exception as error:
            if len(tickets) > 1:  # whose fault it is shows alone
                for ticket in tickets:
                    self._draw(model, [ticket])
                return
            fail(tickets[0], error)
            return
        for batch in job.batches:
            self._draw_batch(job, batch, model.preview, tickets)
        self.saver(lambda: [ticket.end(State.COMPLETED) for ticket in tickets])

    def _draw_batch(self, job: Job, batch: Batch, preview: Preview, tickets: Sequence[Ticket]) -> None:
        """The pictures of a batch that somebody waits for; one by one if together they fail."""
        batch = tuple(picture for picture in batch if not tickets[picture.prompt].is_over)
        if not batch:
            return
        try:
            drawn = draw_batch(job, batch, Watch(job, batch, preview, tickets))
            images, batch = to_pil(drawn.images), drawn.batch
        except NobodyWaits:
            return
        except Exception as error:
            if len(batch) == 1:  # after what was drawn of it before is kept
                self.saver(partial(fail, tickets[batch[0].prompt], error))
                return
            log.warning("a batch of %d failed (%s): one by one", len(batch), type(error).__name__)
            for picture in batch:
                self._draw_batch(job, (picture,), preview, tickets)
            return

        def keep() -> None:
            for image, picture in zip(images, batch, strict=True):
                self._keep(tickets[picture.prompt], image, picture)

        self.saver(keep)

    def _keep(self, ticket: Ticket, image: Image, picture: Picture) -> None:
        if ticket.is_over:
            return
        try:
            request = as_asked(picture.request, ticket.request)
            ticket.add(self.keep(ticket, image, request), bool(picture.flagged))
        except Exception as error:  # a full disk, most often: it fails this ticket only
            fail(ticket, error)


def located(request: Request, root: Path, networks: Mapping[str, Path]) -> Request:
    """A request with whole paths in place of what pictures say: the ends of their images', networks' names.

    Raises UserError for a network that is gone.
    """

    def here(place: str | None) -> str | None:
        return None if place is None else str(root / place)

    def path(name: str) -> str:
        if name not in networks:
            raise unknown("network", name, list(networks))
        return str(networks[name])

    fields: dict[str, object] = {name: here(getattr(request, name)) for name in IMAGES}
    if request.control:
        fields["control"] = tuple(
            use.replace(model=path(use.model), image=here(use.image), mask=here(use.mask))
            for use in request.control
        )
    if request.image_prompts:
        fields["image_prompts"] = tuple(
            use.replace(
                adapter=path(use.adapter),
                images=tuple(str(root / place) for place in use.images),
                masks=tuple(str(root / place) for place in use.masks),
            )
            for use in request.image_prompts
        )
    return request.replace(**fields)


def as_asked(drawn: Request, asked: Request) -> Request:
    """What was drawn, which notes the digests of its files, with the names that these were asked by."""
    fields: dict[str, object] = {name: getattr(asked, name) for name in IMAGES}
    for name, own in (
        ("control", ("model", "image", "mask")),
        ("image_prompts", ("adapter", "images", "masks")),
    ):
        if uses := getattr(asked, name):
            pairs = zip(getattr(drawn, name), uses, strict=True)
            fields[name] = tuple(use.replace(**{key: getattr(by, key) for key in own}) for use, by in pairs)
    return drawn.replace(**fields)


class Saver:
    """Does what it is given, in order: at once, or `apart` in a thread of its own.

    There not more than two things wait, so that pictures of two batches at most are in memory beside those
    that are drawn.
    """

    def __init__(self, apart: bool = False) -> None:
        self._pool = ThreadPoolExecutor(1, "ldm-save") if apart else None
        self._waiting: deque[Future[object]] = deque()

    def __call__(self, do: Callable[[], object]) -> None:
        if self._pool is None:
            do()
            return
        while len(self._waiting) > 1:
            wait([self._waiting.popleft()])
        self._waiting.append(self._pool.submit(do))

    def close(self) -> None:
        """Wait until all is done."""
        if self._pool is not None:
            self._pool.shutdown()


class Watch:
    """What a batch calls after each step: tickets are told, and nobody's batch stops."""

    def __init__(self, job: Job, batch: Batch, preview: Preview, tickets: Sequence[Ticket]) -> None:
        self.steps, self.preview = job.count_steps(batch), preview
        self.first: dict[int, int] = {}  # prompt -> the row of its first picture
        for row, picture in enumerate(batch):
            self.first.setdefault(picture.prompt, row)
        counts = [picture.prompt for picture in batch]
        self.told = [(tickets[p], row, counts.count(p)) for p, row in self.first.items()]
        # Previews would show what the checker has not seen.
        self.rows = len(batch) if job.model.safety_checker is None else 0

    def __call__(self, step: Step) -> None:
        if all(ticket.is_over for ticket, _, _ in self.told):
            raise NobodyWaits
        x0 = step.x0
        for ticket, row, count in self.told:
            # Second passes may go one by one: their steps show one picture, whose nobody says.
            shown = partial(self.preview, x0[row : row + 1]) if len(x0) == self.rows else None
            ticket.report(step.i + 1, self.steps, count, shown)


def fail(ticket: Ticket, error: Exception) -> None:
    """End a ticket with what its user can do; our own mistakes are logged without what was asked."""
    if isinstance(error, UserError):
        ticket.end(State.FAILED, str(error), True)
    elif is_out_of_memory(error):
        ticket.end(State.FAILED, "not enough memory for this picture: ask for a smaller one", True)
    elif isinstance(error, FloatingPointError):
        ticket.end(State.FAILED, str(error).partition("\n")[0])
    else:
        ticket.end(State.FAILED, internal_error(error))
