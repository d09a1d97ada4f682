"""The model of bulk drawing against closed forms."""

import math
import random

import pytest

from ldm.bulk.simulation import Deaths, Fleet, Store, simulate
from ldm.errors import UserError


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("batches", "workers"), [(1, 1), (10, 3), (12, 4), (13, 4), (3, 8)])
def test_without_deaths_the_time_is_that_of_the_fullest_worker(batches, workers, shared):
    store = Store(latency=(0.25,), connections=4)
    fleet = Fleet(workers, (2.0,), writes=10, start=7.0, shared=shared, store=store)
    each = 2.0 + 3 * 0.25 + 0.25  # 10 pictures by 4 connections, then the note
    outcome = simulate(fleet, batches)
    assert outcome.seconds == pytest.approx(7 + math.ceil(batches / workers) * each)
    assert (outcome.drawn, outcome.useful, outcome.lost, outcome.deaths) == (batches, 2.0 * batches, 0, 0)
    assert outcome.throughput == pytest.approx(batches / outcome.seconds)
    assert outcome.used == pytest.approx(2.0 * batches / workers / outcome.seconds)


@pytest.mark.parametrize(("life", "part", "start", "replaced"), [
    (4.0, 1, 0.0, 0.0), (4.0, 1, 1.0, 3.0), (10.0, 5, 2.0, 0.5),
])  # fmt: skip
def test_deaths_cost_what_renewal_says(life, part, start, replaced):
    """A piece of t seconds that must be lived through takes (1/l + r) e^(l s) (e^(l t) - 1), with l the rate
    of deaths, s a start and r a replacement (Daly 2006; Bougeret et al. 2011)."""
    parts, rate, piece = 10_000, 1 / life, part * 1.0
    fleet = Fleet(1, (1.0,), start=start, part=part, deaths=Deaths(life, replaced))
    outcome = simulate(fleet, parts * part, seed=3)
    each = (life + replaced) * math.exp(rate * start) * (math.exp(rate * piece) - 1)
    assert outcome.seconds == pytest.approx(parts * each, rel=0.03)
    # Work is lost only in processes that have started: of all time that they live, what is not a whole piece.
    lost = (math.exp(rate * piece) - 1) / rate - piece
    assert outcome.lost == pytest.approx(parts * lost, rel=0.06)
    assert outcome.useful == pytest.approx(parts * piece)
    assert outcome.waste == pytest.approx(lost / (lost + piece), rel=0.06)
    assert outcome.deaths == pytest.approx(parts * each / (life + replaced), rel=0.03)


def test_where_one_death_ends_all_lives_are_shorter_by_the_number_of_workers():
    workers, rounds, life = 5, 4_000, 20.0
    fleet = Fleet(workers, (1.0,), shared=False, deaths=Deaths(life, 2.0, together=workers))
    outcome = simulate(fleet, rounds * workers, seed=1)
    alone = simulate(Fleet(1, (1.0,), deaths=Deaths(life / workers, 2.0)), rounds, seed=2)
    assert outcome.seconds == pytest.approx(rounds * (4.0 + 2.0) * (math.exp(1 / 4.0) - 1), rel=0.05)
    assert outcome.seconds == pytest.approx(alone.seconds, rel=0.06)
    assert outcome.deaths % workers == 0
    pairs = simulate(Fleet(4, (1.0,), shared=False, deaths=Deaths(life, 2.0, together=2)), 4 * rounds, seed=3)
    # The later of two groups of two: a little more than the mean of either.
    assert pairs.seconds == pytest.approx(rounds * (10.0 + 2.0) * (math.exp(1 / 10.0) - 1), rel=0.03)
    assert pairs.deaths % 2 == 0


def test_the_best_part_is_youngs():
    """Seconds between parts sqrt(2 c / l): c of writing one, l the rate of deaths (Young 1974)."""
    life, write = 1000.0, 2.0
    best = round(math.sqrt(2 * write * life))  # 63 batches of one second
    seconds = {}
    for part in (8, best, 500):
        fleet = Fleet(1, (1.0,), writes=0, part=part, store=Store((write,)), deaths=Deaths(life))
        seconds[part] = simulate(fleet, 30_000, seed=5).seconds
    assert seconds[best] < 0.95 * seconds[8]
    assert seconds[best] < 0.9 * seconds[500]


def test_one_batch_each_takes_as_long_as_the_longest_of_all_draws():
    service, workers = (1.0, 2.0, 5.0, 9.0), 6
    chances = [(k / 4) ** workers - ((k - 1) / 4) ** workers for k in range(1, 5)]
    expected = sum(time * chance for time, chance in zip(service, chances, strict=True))
    times = [simulate(Fleet(workers, service), workers, seed).seconds for seed in range(1500)]
    assert sum(times) / len(times) == pytest.approx(expected, abs=4 * 2.0 / math.sqrt(1500))
    assert set(times) <= set(service)


def test_a_slow_worker_holds_up_its_share_and_hardly_a_queue():
    fleet = {"workers": 4, "service": (1.0,), "slow": 0.25, "slowness": 3.0}
    own = [simulate(Fleet(**fleet, shared=False), 400, seed).seconds for seed in range(400)]
    assert set(own) == {100.0, 300.0}
    assert own.count(300.0) / len(own) == pytest.approx(1 - 0.75**4, abs=4 * 0.5 / 20)
    for seed, seconds in enumerate(own[:40]):
        queue = simulate(Fleet(**fleet), 400, seed)
        if seconds == 100.0:
            assert queue.seconds == 100.0
        else:  # with k slow ones 4 - k + k / 3 batches a second, and one slow batch at the end
            best = [400 / (4 - k + k / 3) for k in range(1, 5)]
            assert any(time <= queue.seconds <= time + 3 for time in best)


@pytest.mark.parametrize("workers", [1, 4, 40, 200])
def test_an_engine_that_hands_out_one_at_a_time_is_a_limit(workers):
    """The bound of a closed queue, min(n / (z + s), 1 / s), which is met where both times are constant."""
    outcome = simulate(Fleet(workers, (2.0,), dispatch=0.05), 20 * max(workers, 40))
    bound = min(workers / (2.0 + 0.05), 1 / 0.05)
    assert bound * 0.9 <= outcome.throughput <= bound * (1 + 1e-9)


@pytest.mark.parametrize("workers", [1, 40, 200])
def test_a_store_that_takes_so_many_writes_is_a_limit(workers):
    outcome = simulate(Fleet(workers, (2.0,), writes=9, store=Store(rate=200.0)), 4000)
    assert outcome.throughput <= min(workers / 2.05, 200 / 10) * (1 + 1e-9)
    if workers != 40:  # there both are the limit in turn
        assert outcome.throughput == pytest.approx(min(workers / 2.05, 200 / 10), rel=0.02)


def test_workers_begin_one_after_another():
    fleet = Fleet(3, (10.0,), start=5.0, apart=2.0)
    assert simulate(fleet, 3).seconds == 2 * 2.0 + 5.0 + 10.0


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_all_is_drawn_once_and_the_seed_says_when(seed):
    chance = random.Random(seed)
    fleet = Fleet(
        workers=chance.randint(1, 12),
        service=(1.5,),
        writes=chance.randint(1, 8),
        start=chance.choice([0.0, 3.0]),
        apart=chance.choice([0.0, 0.7]),
        part=chance.randint(1, 5),
        shared=chance.random() < 0.5,
        dispatch=chance.choice([0.0, 0.01]),
        store=Store((0.0, 0.1), chance.randint(1, 4), chance.choice([50.0, math.inf])),
        deaths=Deaths(
            chance.choice([8.0, 30.0]) * 12, chance.choice([0.0, 4.0]), chance.choice([1, 1, 3, 20])
        ),
    )
    batches = chance.randint(1, 300)
    outcome = simulate(fleet, batches, seed)
    assert outcome.useful == pytest.approx(1.5 * batches)
    assert batches <= outcome.drawn <= batches + outcome.deaths * fleet.part
    assert (outcome.lost > 0) >= (outcome.drawn > batches)
    assert outcome.seconds >= outcome.useful / fleet.workers
    assert simulate(fleet, batches, seed) == outcome
    if outcome.deaths:
        assert simulate(fleet, batches, seed + 1000) != outcome


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fleet(0, (1.0,)), "above 0"),
        (lambda: Fleet(1, ()), "are needed"),
        (lambda: Fleet(1, (-1.0,)), "finite"),
        (lambda: Fleet(1, (math.nan,)), "finite"),
        (lambda: Fleet(1, (1.0,), slow=1.5), "0 to 1, not 1.5"),
        (lambda: Fleet(1, (1.0,), deaths=Deaths(0.0)), "above 0"),
        (lambda: simulate(Fleet(1, (1.0,)), 0), "1 batch or more, not 0"),
        (lambda: simulate(Fleet(1, (1.0,), part=50, deaths=Deaths(4.0)), 100), "give smaller parts"),
    ],
)
def test_what_cannot_be_is_told(make, message):
    with pytest.raises(UserError, match=message):
        make()
