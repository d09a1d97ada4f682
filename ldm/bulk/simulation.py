"""Bulk drawing on more workers than there are here: how long it takes, and how much is drawn twice.

A discrete-event model. Workers start, take batches from the engine, draw them and save their pictures, as the
mapper does; then they note them, and only what is noted is done. A worker that dies loses what it has not
noted: that goes back to where it was taken from, and another process begins after a while. All times are
seconds, and measured ones go in. Saving is on the slow side: a real worker draws the next batch meanwhile.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError

if TYPE_CHECKING:
    from simpy import Container, Environment

Waiting = Generator[Any, Any, None]  # what a process of simpy waits for, event by event


@dataclass(frozen=True)
class Store:
    """Where pictures and notes go.

    latency: of one write; each takes one of these, drawn at random. connections: writes of one worker that
    are under way at once. rate: writes a second that it takes from all workers together; Amazon S3 says
    3,500 for a prefix.
    """

    latency: tuple[float, ...] = (0.0,)
    connections: int = 1
    rate: float = math.inf


@dataclass(frozen=True)
class Deaths:
    """Of processes: each lives for a time of exponential distribution with this mean, and is replaced.

    replaced: from its death to the begin of another. together: so many neighbours that one death ends them
    all, as in torchrun, which starts every rank anew.
    """

    mean_life: float = math.inf
    replaced: float = 0.0
    together: int = 1


@dataclass(frozen=True)
class Fleet:
    """Workers, and what they are given.

    service: drawing one batch; each takes one of these, drawn at random. writes: of a batch's pictures.
    slow: the share of workers that take `slowness` times as long. start: from a process's begin to its first
    batch. apart: between the begins of two workers. part: batches that a worker takes at once, notes at once
    and loses at once. shared: workers take from one queue, as Ray Data's do; else each has its own share from
    the beginning, as ranks have. dispatch: what the engine needs to hand out a part, one after another.
    """

    workers: int
    service: tuple[float, ...]
    writes: int = 1
    slow: float = 0.0
    slowness: float = 1.0
    start: float = 0.0
    apart: float = 0.0
    part: int = 1
    shared: bool = True
    dispatch: float = 0.0
    store: Store = Store()
    deaths: Deaths = Deaths()

    def __post_init__(self) -> None:
        """Raise UserError for what cannot be."""
        positive = (self.workers, self.part, self.slowness, self.store.connections, self.store.rate)
        times = (*self.service, *self.store.latency, self.start, self.apart, self.dispatch)
        if min(*positive, self.deaths.mean_life, self.deaths.together) <= 0 or self.writes < 0:
            raise UserError("workers, parts, connections, rates and lives are above 0, writes 0 or more")
        if not self.service or not self.store.latency or not all(0 <= time < math.inf for time in times):
            raise UserError("times are finite, 0 or more, and one of a batch and one of a write are needed")
        if not 0 <= self.slow <= 1:
            raise UserError(f"a share of slow workers is 0 to 1, not {self.slow:g}")


@dataclass
class Outcome:
    """What came of it.

    seconds: to the last note. drawn: batches, those that were lost included. useful, lost:
    what workers spent on drawing batches that are noted, and on those that were lost with a
    process, whole or not. deaths: of processes.
    """

    batches: int
    workers: int
    seconds: float = 0.0
    drawn: int = 0
    useful: float = 0.0
    lost: float = 0.0
    deaths: int = 0

    @property
    def throughput(self) -> float:
        """Batches a second, from the first begin to the end."""
        return self.batches / self.seconds if self.seconds else math.inf

    @property
    def waste(self) -> float:
        """The share of work that was lost with processes, 0 to 1."""
        work = self.useful + self.lost
        return self.lost / work if work else 0.0

    @property
    def used(self) -> float:
        """The share of all workers' time that went into batches that stand, 0 to 1."""
        return self.useful / (self.workers * self.seconds) if self.seconds else 1.0


def simulate(fleet: Fleet, batches: int, seed: int = 0) -> Outcome:
    """Draw that many batches. The same seed gives the same outcome.

    Raises UserError where a process never lives long enough for a part.
    """
    import simpy

    if batches < 1:
        raise UserError(f"simulates 1 batch or more, not {batches}")
    life = fleet.deaths.mean_life / min(fleet.deaths.together, fleet.workers)
    if fleet.start + fleet.part * min(fleet.service) > 10 * life:  # one life in 22,000 lasts so long
        raise UserError("start and one part take 10 times as long as a process lives: give smaller parts")
    environment = simpy.Environment()
    drawing = _Drawing(environment, fleet, batches, seed)
    for number in range(fleet.workers):
        environment.process(_Worker(drawing, number).live())
    environment.run(until=drawing.finished)
    drawing.outcome.seconds = environment.now
    return drawing.outcome


# --- what workers share ----------------------------------------------------------------------------------


class _Drawing:
    """Queues, the engine's hand, the store's door, and what is done."""

    def __init__(self, environment: Environment, fleet: Fleet, batches: int, seed: int) -> None:
        import simpy

        self.environment, self.fleet, self.seed = environment, fleet, seed
        self.outcome = Outcome(batches, fleet.workers)
        self.finished = environment.event()
        self.left = batches
        shares = 1 if fleet.shared else fleet.workers
        counts = [len(range(share, batches, shares)) for share in range(shares)]
        self.queues: list[Container] = [simpy.Container(environment, init=count) for count in counts]
        self.engine, self.door = _Turns(environment), _Turns(environment)
        size = min(fleet.deaths.together, fleet.workers)
        self.ends = [
            _Ends(random.Random(f"{seed} group {group}"), fleet.deaths.mean_life / size)
            for group in range(-(-fleet.workers // size))
        ]

    def done(self, batches: int) -> None:
        """So many more are noted."""
        self.left -= batches
        if not self.left:
            self.finished.succeed()


@dataclass
class _Turns:
    """What serves one after another."""

    environment: Environment
    free: float = 0.0  # when the last one who came will have been served

    def take(self, seconds: float) -> float:
        """Seconds until this one, who takes so long, has been served."""
        self.free = max(self.free, self.environment.now) + seconds
        return self.free - self.environment.now


class _Ends:
    """When neighbours die together."""

    def __init__(self, chance: random.Random, mean: float) -> None:
        self.chance, self.mean = chance, mean
        self.next = 0.0

    def after(self, now: float) -> float:
        """The first after now, which never goes back."""
        while self.next <= now:
            self.next += math.inf if math.isinf(self.mean) else self.chance.expovariate(1 / self.mean)
        return self.next


# --- a worker --------------------------------------------------------------------------------------------


class _Dies(Exception):
    """A worker's process ends in the middle of what it does."""


class _Worker:
    """A place for a process, and one after another the processes that it has."""

    def __init__(self, drawing: _Drawing, number: int) -> None:
        self.drawing, self.fleet, self.number = drawing, drawing.fleet, number
        self.chance = random.Random(f"{drawing.seed} {number}")
        self.factor = self.fleet.slowness if self.chance.random() < self.fleet.slow else 1.0
        self.queue = drawing.queues[number % len(drawing.queues)]
        self.ends = drawing.ends[number // drawing.fleet.deaths.together]
        self.dies = math.inf
        self.held, self.worked = 0, 0.0  # batches that are not noted yet, and seconds of drawing

    def live(self) -> Waiting:
        """Start and draw, and again after each death."""
        environment, deaths = self.drawing.environment, self.fleet.deaths
        yield environment.timeout(self.number * self.fleet.apart)
        while True:
            self.dies = self.ends.after(environment.now)
            try:
                yield from self.spend(self.fleet.start)
                while True:
                    yield from self.draw()
            except _Dies:
                yield from self.give_back()
            yield environment.timeout(deaths.replaced)

    def draw(self) -> Waiting:
        """Take batches and draw them, then note them."""
        environment, outcome = self.drawing.environment, self.drawing.outcome
        taken = max(1, min(self.fleet.part, int(self.queue.level)))
        yield self.queue.get(taken)
        self.held = taken
        yield from self.spend(self.drawing.engine.take(self.fleet.dispatch))
        for _ in range(taken):
            began = environment.now
            try:
                yield from self.spend(self.factor * self.chance.choice(self.fleet.service))
            finally:
                self.worked += environment.now - began
            outcome.drawn += 1
            yield from self.save(self.fleet.writes)
        yield from self.save(1)
        outcome.useful += self.worked
        self.drawing.done(taken)
        self.held, self.worked = 0, 0.0

    def save(self, writes: int) -> Waiting:
        """Wait for the store: for its door, and for the writes of one connection, one after another."""
        store = self.fleet.store
        each = math.ceil(writes / store.connections)
        latency = sum(self.chance.choice(store.latency) for _ in range(each))
        yield from self.spend(self.drawing.door.take(writes / store.rate) + latency)

    def spend(self, seconds: float) -> Waiting:
        """Let time pass. Raises _Dies where the process does not live as long."""
        environment = self.drawing.environment
        if environment.now + seconds > self.dies:
            yield environment.timeout(max(0.0, self.dies - environment.now))
            raise _Dies
        if seconds:
            yield environment.timeout(seconds)

    def give_back(self) -> Waiting:
        """What this process had taken and not noted is to be drawn again."""
        outcome = self.drawing.outcome
        outcome.deaths += 1
        outcome.lost += self.worked
        if self.held:
            yield self.queue.put(self.held)
        self.held, self.worked = 0, 0.0
