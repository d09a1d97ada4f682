"""What is measured: each batch once, by a clock; and what logs say, beside the model."""

import itertools
import math

import pytest
from bulk_rows import ROWS

import ldm
from ldm.bulk.mapper import Models
from ldm.bulk.measuring import THINGS, batch_times, checked, dispatch, measure, write_table
from ldm.bulk.run import Order, hire


def test_batches_and_pictures_are_timed_but_for_the_first(table, tiny_folder, tmp_path):
    order = Order((table,), str(tmp_path / "out"), 2)
    plan, storage = order.plan(), order.storage("measured")
    pipe = ldm.load(str(tiny_folder), device=None, dtype="fp32")
    worker = hire(order, plan, storage, Models(pipe, ldm.load))
    ticks = itertools.count()
    measured = measure(worker, "tiny", 3.0, lambda: float(next(ticks)))
    assert (measured.what, measured.batch, measured.start) == ("tiny", 2, 3.0)
    assert measured.service == (1.0,) * (len(plan.pieces) - 1)
    assert measured.write == (1.0,) * (len(ROWS) - 2)
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == len(ROWS)


def test_logs_say_when_each_batch_was_done(bulk, table, tmp_path):
    out = tmp_path / "out"
    for rank in range(2):
        assert bulk(table, "-o", out, "--batch", "2", "--rank", rank, "--world", "2")[0] == 0
    plan = Order((table,), str(out), 2).plan()
    times = batch_times(out, plan)
    assert sorted(map(len, times)) == sorted(len(plan.share(rank, 2)) for rank in range(2))
    assert all(each == sorted(each) for each in times)


def test_the_model_gives_back_what_even_workers_took():
    times = [[105.0, 107.0, 109.0], [105.0, 107.0]]  # three seconds to start, two for a batch
    assert checked(times, 100.0, shared=False) == (9.0, [9.0] * 20)
    assert checked(times, 100.0, shared=True) == (9.0, [9.0] * 20)
    seconds, simulated = checked([[4.0, 5.0, 8.0]], 0.0, shared=False)
    assert seconds == 8.0
    assert set(simulated) <= {2.0 + a + b + c for a, b, c in itertools.product((1.0, 3.0), repeat=3)}
    assert len(set(simulated)) > 1


def test_a_table_names_what_the_embedded_model_draws(tmp_path):
    write_table(tmp_path / "requests.jsonl", 8, 4)
    rows = Order((str(tmp_path / "requests.jsonl"),), "out", 4).plan()
    assert [len(piece.rows) for piece in rows.pieces] == [4, 4]
    assert THINGS[1] in rows.rows[7].fields


@pytest.mark.slow
def test_ray_hands_out_blocks_in_finite_time():
    pytest.importorskip("ray")
    assert 0 < dispatch(1) < math.inf
