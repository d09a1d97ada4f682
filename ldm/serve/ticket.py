"""A request on its way: waiting, being drawn, done; and who watches it."""

from __future__ import annotations

import logging
import secrets
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from ldm.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image


log = logging.getLogger("ldm.serve")


class State(StrEnum):
    """As stable-diffusion.cpp's server names them, and one for what a restart found waiting."""

    QUEUED = "queued"
    GENERATING = "generating"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"

    @property
    def is_over(self) -> bool:
        return self not in (State.QUEUED, State.GENERATING)


def new_id() -> str:
    """Names sort as their times do, and nobody guesses one: 20261128T032450-5f0c1d2e3a4b."""
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(6)}"


@dataclass(eq=False)
class Ticket:
    """One request's place in the queue. Threads share it: states change under its lock, and never go back.

    `progress` is the share that is drawn, over all its pictures; `pictures` are the ids of finished ones.
    """

    request: Request
    model: str  # the name under which the server knows it
    source: str = "jobs"  # the API that it came by
    key: str = ""  # tickets of one key may be drawn together
    id: str = field(default_factory=new_id)
    created: float = field(default_factory=time.time)  # seconds since 1970
    started: float | None = None
    finished: float | None = None
    state: State = State.QUEUED
    error: str | None = None
    is_users_fault: bool = False  # that it failed: the error says what to change
    pictures: list[str] = field(default_factory=list)
    flagged: list[str] = field(default_factory=list)  # of these, what a safety checker made black
    step: int = 0  # of the batch that is drawn now
    steps: int = 0
    progress: float = 0.0
    glimpse: Callable[[], Image] | None = None  # what it looks like now: costs something when it is called
    on_over: Callable[[Ticket], object] | None = None  # called once, before those who watch
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    _watchers: list[Callable[[], object]] = field(default_factory=list, repr=False)

    @property
    def is_over(self) -> bool:
        return self.state.is_over

    @property
    def eta(self) -> float | None:
        """Seconds left, by those it took; None before the first step and after the last."""
        if self.state is not State.GENERATING or self.started is None or not self.progress:
            return None
        return (time.time() - self.started) * (1 / self.progress - 1)

    def begin(self) -> bool:
        """Whether it may be drawn: False if it was cancelled."""
        with self._lock:
            if self.state is not State.QUEUED:
                return False
            self.state, self.started = State.GENERATING, time.time()
        self._tell()
        return True

    def report(
        self, step: int, steps: int, count: int = 1, glimpse: Callable[[], Image] | None = None
    ) -> None:
        """So many steps of a batch are done, which holds `count` of its pictures."""
        share = (len(self.pictures) + count * step / max(steps, 1)) / self.request.num_images
        with self._lock:
            if self.is_over:
                return
            self.step, self.steps, self.glimpse = step, steps, glimpse
            self.progress = max(self.progress, min(share, 1.0))
        self._tell()

    def add(self, picture: str, flagged: bool = False) -> None:
        """A picture is finished."""
        with self._lock:
            self.pictures.append(picture)
            self.flagged += [picture] if flagged else []
            self.progress = max(self.progress, len(self.pictures) / self.request.num_images)
        self._tell()

    def end(self, state: State, error: str | None = None, is_users_fault: bool = False) -> bool:
        """The last change of state; False if there was one before, which stays."""
        with self._lock:
            if self.is_over:
                return False
            self.state, self.error, self.is_users_fault = state, error, is_users_fault
            self.finished, self.glimpse = time.time(), None
            if state is State.COMPLETED:
                self.progress = 1.0
        if self.on_over is not None:
            self.on_over(self)
        self._tell()
        return True

    def watch(self, call: Callable[[], object]) -> Callable[[], None]:
        """`call` after each change, from whichever thread made it: it must be quick. Gives what ends that."""
        with self._lock:
            self._watchers.append(call)

        def stop() -> None:
            with self._lock:
                if call in self._watchers:
                    self._watchers.remove(call)

        return stop

    def wait(self, timeout: float | None = None) -> bool:
        """Block until it is over; False if that takes longer than `timeout` seconds."""
        over = threading.Event()
        stop = self.watch(lambda: over.set() if self.is_over else None)
        try:
            return self.is_over or over.wait(timeout)
        finally:
            stop()

    def _tell(self) -> None:
        with self._lock:
            watchers = list(self._watchers)
        for call in watchers:
            call()


def as_json(ticket: Ticket, position: int | None = None) -> dict[str, Any]:
    """What the API tells of a ticket; `position` is 0 for the next to be drawn."""
    eta = ticket.eta
    return {
        "id": ticket.id,
        "status": ticket.state.value,
        "model": ticket.model,
        "created": ticket.created,
        "started": ticket.started,
        "finished": ticket.finished,
        "queue_position": position,
        "progress": round(ticket.progress, 4),
        "step": ticket.step,
        "steps": ticket.steps,
        "eta": None if eta is None else round(eta, 2),
        "pictures": list(ticket.pictures),
        "flagged": list(ticket.flagged),
        "error": ticket.error,
        "request": ticket.request.filled_in("json"),
    }


def internal_error(error: Exception) -> str:
    """What is told of a mistake of ours. The log has its place, not its message, which may quote a prompt."""
    what = f"internal error: {type(error).__name__}"
    log.error("%s\n%s", what, "".join(traceback.format_tb(error.__traceback__)))
    return what
