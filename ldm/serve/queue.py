"""Requests wait here in order, and one thread a device draws them; no HTTP, no torch.

Whoever asks first is drawn next. Requests of one key (alike but for their texts and seeds) go along with the
first of them, as many as a batch holds: a batch is quicker than its pictures one by one, and the same seed
gives the same picture in both.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from ldm.serve.ticket import State, Ticket, internal_error

# Draws tickets of one key, and ends each: those that it saves apart, a little later.
Draw = Callable[[Sequence[Ticket]], object]
PICTURES = 8  # drawn together at most, where memory allows
CAPACITY = 64  # tickets that wait
SECONDS = 10.0  # of a ticket, before any was drawn


class Full(Exception):
    """There is no more room to wait; `seconds` is about when there will be."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the queue is full: ask again in {seconds:.0f} seconds")
        self.seconds = seconds


class Closed(Exception):
    """The server is stopping."""


class Queue:
    """A bounded queue with a worker thread for each of `draws`."""

    def __init__(self, draws: Sequence[Draw], capacity: int = CAPACITY, pictures: int = PICTURES) -> None:
        self.capacity, self.most = capacity, pictures
        self._waiting: list[Ticket] = []
        self._drawing: list[Ticket] = []
        self._changed = threading.Condition()
        self._closed = False
        self._seconds = SECONDS  # of a ticket, lately
        self._threads = [
            threading.Thread(target=self._work, args=(draw,), name=f"ldm-draw-{k}", daemon=True)
            for k, draw in enumerate(draws)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> tuple[Ticket, ...]:
        """In the order in which they are drawn."""
        with self._changed:
            return tuple(self._waiting)

    @property
    def drawing(self) -> tuple[Ticket, ...]:
        with self._changed:
            return tuple(each for each in self._drawing if not each.is_over)

    @property
    def is_alive(self) -> bool:
        """Whether every worker is there."""
        return not self._closed and all(thread.is_alive() for thread in self._threads)

    def position(self, ticket: Ticket) -> int | None:
        """How many wait before it; None if it does not wait."""
        with self._changed:
            return self._waiting.index(ticket) if ticket in self._waiting else None

    def put(self, ticket: Ticket) -> None:
        """Let it wait. Raises Full, and Closed."""
        with self._changed:
            if self._closed:
                raise Closed("the server is stopping")
            if len(self._waiting) >= self.capacity:
                raise Full(self.seconds_left(1))
            self._waiting.append(ticket)
            self._changed.notify()

    def seconds_left(self, tickets: int) -> float:
        """About how long so many tickets take, by the last ones; at least a second."""
        return max(1.0, tickets * self._seconds / max(1, len(self._threads)))

    def cancel(self, ticket: Ticket) -> bool:
        """Wherever it is: what waits never begins, what is drawn stops at its next step.

        False if it was over.
        """
        with self._changed:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
        return ticket.end(State.CANCELLED, "it was cancelled")

    def close(self, timeout: float = 10.0) -> None:
        """Stop: what is drawn ends at its next step. What waits and what is drawn is `interrupted`."""
        with self._changed:
            self._closed = True
            left = [*self._drawing, *self._waiting]
            self._waiting.clear()
            self._changed.notify_all()
        for ticket in left:
            ticket.end(State.INTERRUPTED, STOPPED)
        for thread in self._threads:
            thread.join(timeout)

    def _take(self) -> list[Ticket] | None:
        """The next ticket with those that can go along; None when the queue is closed."""
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            first = self._waiting[0]
            group, room = [first], self.most - first.request.num_images
            for each in self._waiting[1:]:
                if each.key == first.key and each.request.num_images <= room:
                    group.append(each)
                    room -= each.request.num_images
            self._waiting = [each for each in self._waiting if each not in group]
            self._drawing += group
            return group

    def _work(self, draw: Draw) -> None:
        while (group := self._take()) is not None:
            start = time.perf_counter()
            begun = [ticket for ticket in group if ticket.begin()]
            try:
                if begun:
                    draw(begun)
            except Exception as error:  # a worker outlives whatever happens to a drawing
                what = internal_error(error)
                for ticket in begun:
                    ticket.end(State.FAILED, what)
            finally:
                with self._changed:
                    # Those whose pictures are still being saved stay until they are over.
                    self._drawing = [each for each in self._drawing if not each.is_over]
                    if begun:
                        seconds = (time.perf_counter() - start) / len(begun)
                        self._seconds = 0.7 * self._seconds + 0.3 * seconds


STOPPED = "the server stopped before this was drawn: ask for it again"
