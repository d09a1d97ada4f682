"""The queue without HTTP and without networks: order, batches, cancelling, faults that stay alone."""

import threading
import time

import pytest

from ldm.request import Request
from ldm.serve.queue import Closed, Full, Queue
from ldm.serve.ticket import State, Ticket


class Hand:
    """Draws when it is told to: each group waits for `go`."""

    def __init__(self):
        self.groups, self.go, self.begun = [], threading.Semaphore(0), threading.Semaphore(0)
        self.fault = None

    def __call__(self, tickets):
        self.groups.append([ticket.request.prompt for ticket in tickets])
        self.begun.release()
        assert self.go.acquire(timeout=10)
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        for ticket in tickets:
            ticket.end(State.COMPLETED)


@pytest.fixture
def hand():
    return Hand()


@pytest.fixture
def queue(hand):
    queue = Queue([hand], capacity=6, pictures=4)
    yield queue
    hand.go.release(100)
    queue.close()


def ask(queue, prompt, key="a", count=1):
    ticket = Ticket(Request(prompt=prompt, seeds=range(count)), "model", key=key)
    queue.put(ticket)
    return ticket


def test_alike_ones_go_along_and_the_first_is_never_passed(queue, hand):
    ask(queue, "busy", "other")
    hand.begun.acquire(timeout=10)
    tickets = [
        ask(queue, *each) for each in (("1", "a"), ("2", "b"), ("3", "a", 2), ("4", "a", 2), ("5", "a"))
    ]
    assert [queue.position(ticket) for ticket in tickets] == [0, 1, 2, 3, 4]
    hand.go.release(10)
    assert all(ticket.wait(10) for ticket in tickets)
    # A batch holds four pictures: "4" would be the fifth, and "5" fits beside "1" and "3".
    assert hand.groups == [["busy"], ["1", "3", "5"], ["2"], ["4"]]
    assert {ticket.state for ticket in tickets} == {State.COMPLETED}


def test_more_than_the_queue_holds_is_refused_with_a_time(queue, hand):
    ask(queue, "busy")
    hand.begun.acquire(timeout=10)
    for k in range(6):
        ask(queue, str(k))
    with pytest.raises(Full) as refused:
        ask(queue, "too many")
    assert refused.value.seconds >= 1
    assert len(queue.waiting) == 6


def test_what_waits_can_be_cancelled_and_never_begins(queue, hand):
    ask(queue, "busy")
    hand.begun.acquire(timeout=10)
    kept, dropped = ask(queue, "kept"), ask(queue, "dropped")
    assert queue.cancel(dropped)
    assert not queue.cancel(dropped)  # it is over
    hand.go.release(10)
    assert kept.wait(10)
    assert hand.groups == [["busy"], ["kept"]]
    assert (dropped.state, dropped.started) == (State.CANCELLED, None)


def test_a_worker_outlives_what_happens_to_a_drawing(queue, hand, caplog):
    hand.fault = ZeroDivisionError("a secret prompt")
    failed = ask(queue, "failed")
    hand.go.release(2)
    assert failed.wait(10)
    assert (failed.state, failed.error) == (State.FAILED, "internal error: ZeroDivisionError")
    later = ask(queue, "later")
    assert later.wait(10)
    assert later.state is State.COMPLETED
    assert queue.is_alive
    assert "in __call__" in caplog.text
    assert "secret" not in caplog.text


def test_closing_tells_all_that_wait(queue, hand):
    drawn = ask(queue, "drawn")
    hand.begun.acquire(timeout=10)
    waiting = ask(queue, "waiting")
    threading.Timer(0.05, hand.go.release).start()
    queue.close()
    assert {drawn.state, waiting.state} == {State.INTERRUPTED}
    assert "ask for it again" in waiting.error
    with pytest.raises(Closed):
        ask(queue, "late")


def test_two_devices_draw_at_once():
    hands = Hand(), Hand()
    queue = Queue(hands, capacity=6, pictures=1)
    first, second = ask(queue, "1"), ask(queue, "2")
    assert all(hand.begun.acquire(timeout=10) for hand in hands)
    for hand in hands:
        hand.go.release()
    assert first.wait(10)
    assert second.wait(10)
    assert sorted(hands[0].groups + hands[1].groups) == [["1"], ["2"]]
    queue.close()


def test_progress_never_goes_back_and_time_left_follows_it():
    ticket, seen = Ticket(Request(seeds=(1, 2)), "model"), []
    ticket.watch(lambda: seen.append(ticket.progress))
    ticket.begin()
    ticket.started = time.time() - 3
    ticket.report(1, 4)  # of the first picture's four steps one: an eighth of all
    assert ticket.progress == 0.125
    assert ticket.eta == pytest.approx(3 * 7, abs=0.5)
    ticket.report(4, 4)
    ticket.add("one")
    ticket.report(0, 4)
    ticket.report(2, 4)
    ticket.report(1, 4)  # a batch that failed is drawn again, one by one
    assert ticket.progress == 0.75
    ticket.end(State.COMPLETED)
    ticket.report(1, 4)  # too late
    assert seen == sorted(seen)
    assert (ticket.progress, ticket.eta) == (1.0, None)


def test_one_that_is_saved_apart_is_drawn_until_it_is_over():
    """Programs take a server without such for an idle one."""
    saved = []

    def draw(tickets):
        saved.extend(tickets)

    other = Queue([draw], capacity=6, pictures=4)
    ticket = ask(other, "a")
    while not saved:
        time.sleep(0.01)
    time.sleep(0.05)
    assert other.drawing == (ticket,)
    ticket.end(State.COMPLETED)
    assert other.drawing == ()
    other.close()
