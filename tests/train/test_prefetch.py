"""The next batch is made beside a step, and the run is to the bit the one without that."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_training import Line, exported, tiny_recipe

from ldm.errors import UserError
from ldm.train.loop import train
from ldm.train.prefetch import Prefetcher

ELSEWHERE = torch.device("meta")  # a device that is not the CPU


class Made:
    """What is asked for, and on which threads."""

    def __init__(self, fails=()):
        self.places, self.threads, self.fails = [], [], fails

    def __call__(self, place):
        self.places.append(place)
        self.threads.append(threading.current_thread())
        if place in self.fails:
            raise UserError(f"no picture for {place}")
        return {"x": torch.full((2,), float(place[0]))}


def running():
    return [thread for thread in threading.enumerate() if thread.name.startswith("next batch")]


def test_the_next_batch_is_made_on_a_thread_and_not_again():
    made = Made()
    batches = Prefetcher(made, ELSEWHERE)
    assert batches.take((0, 0), (0, 1))["x"].device == ELSEWHERE
    batches.settle()
    assert made.places == [(0, 0), (0, 1)]
    batches.take((0, 1), (1, 0))
    batches.settle()
    assert made.places == [(0, 0), (0, 1), (1, 0)]
    assert made.threads[0] is threading.main_thread()
    assert threading.main_thread() not in made.threads[1:]
    batches.take((5, 0), (5, 1))  # not the one that was expected
    batches.close()
    assert made.places[3] == (5, 0)
    assert running() == []


def test_what_goes_wrong_there_is_told_when_the_batch_is_wanted_and_else_never():
    batches = Prefetcher(Made(fails={(1, 0)}), ELSEWHERE)
    batches.take((0, 0), (1, 0))
    batches.settle()
    with pytest.raises(UserError, match=r"no picture for \(1, 0\)"):
        batches.take((1, 0), (2, 0))
    batches.take((0, 0), (1, 0))
    batches.close()
    assert running() == []


def test_on_a_cpu_nothing_is_made_ahead():
    made = Made()
    batches = Prefetcher(made, torch.device("cpu"))
    batches.take((0, 0), (0, 1))
    batches.settle()
    batches.close()
    assert made.places == [(0, 0)]


def test_copies_to_cuda_are_from_pinned_memory_and_are_not_waited_for(monkeypatch):
    class Told(torch.Tensor):
        def pin_memory(self):
            calls.append("pinned")
            return self

        def to(self, device, non_blocking):
            calls.append((str(device), non_blocking))
            return self

    calls, chosen = [], []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: chosen.append((device, threading.current_thread().name))
    )
    batches = Prefetcher(lambda place: {"x": torch.ones(2).as_subclass(Told)}, torch.device("cuda:1"))
    batches.take((0, 0), (0, 1))
    batches.close()
    assert calls.count("pinned") == 2
    assert ("cuda:1", True) in calls
    assert chosen == [(torch.device("cuda:1"), "next batch_0")], "a thread has a current card of its own"


class Ahead(Prefetcher):
    """As on a GPU, where the step runs here."""

    def __init__(self, make, device):
        super().__init__(make, device)
        self.pool = ThreadPoolExecutor(1, "next batch")


@pytest.mark.parametrize("interrupt", [0, 4, 5])
def test_a_run_is_the_same_to_the_bit_and_goes_on_so(tmp_path, monkeypatch, interrupt):
    recipe = tiny_recipe(6, parts=2, checkpointing_steps=4, validation_steps=3, logging_steps=1)
    plain = Line()
    train(plain, recipe, tmp_path / "plain")
    monkeypatch.setattr("ldm.train.run.Prefetcher", Ahead)
    tasks = [Line(interrupt=interrupt), *([Line()] if interrupt else [])]
    for task in tasks:
        train(task, recipe, tmp_path / "ahead")
        assert running() == []
    seen = [batch for task in tasks for batch in task.batches]
    if not interrupt:
        assert all(torch.equal(a["x"], b["x"]) for a, b in zip(plain.batches, seen, strict=True))
    first, second = exported(tmp_path / "plain"), exported(tmp_path / "ahead")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_thread_ends_with_a_run_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.train.run.Prefetcher", Ahead)
    with pytest.raises(UserError, match="step 2: the loss is nan"):
        train(Line(poison={3}), tiny_recipe(6), tmp_path)
    assert running() == []


def test_nothing_is_made_while_the_networks_are_looked_at(tmp_path, monkeypatch):
    """Their mode and weights are others then, and a batch may be made by one of them."""
    monkeypatch.setattr("ldm.train.run.Prefetcher", Ahead)
    busy = threading.Event()

    class Watched(Line):
        def batch(self, rng, size, number):
            busy.set()
            assert self.training
            threading.Event().wait(0.02)
            assert self.training
            busy.clear()
            return super().batch(rng, size, number)

        def evaluate(self):
            assert not busy.is_set()
            return super().evaluate()

    train(Watched(), tiny_recipe(4, validation_steps=1), tmp_path)
