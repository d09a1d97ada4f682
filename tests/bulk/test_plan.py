"""Who draws what with what: it follows from the table, and all of it is drawn by somebody."""

import itertools
import random

import pytest
from bulk_rows import write_jsonl

from ldm.bulk.plan import Plan, position
from ldm.bulk.rows import read_rows
from ldm.errors import UserError

MODELS, SIZES, TAGS = (None, "one", "two"), (None, 64, 128), ("", "<lora:a:0.5>", "<lora:b>")


@pytest.fixture
def rows(tmp_path):
    drawn = random.Random(0)
    table = []
    for k in range(500):
        row = {"id": f"r{k}", "prompt": f"x {drawn.choice(TAGS)}"}
        row |= {"model": drawn.choice(MODELS), "width": drawn.choice(SIZES), "steps": drawn.choice((4, 8))}
        table.append({name: value for name, value in row.items() if value is not None})
    return read_rows([write_jsonl(tmp_path / "r.jsonl", table)]), table


@pytest.mark.parametrize("shard", [None, 40, 3])
def test_every_row_is_in_one_piece_of_one_worker(rows, shard):
    plan = Plan.of(rows[0], 8, shard)
    for world in (1, 2, 7, 100):
        shares = [plan.share(rank, world) for rank in range(world)]
        assert sorted(i for share in shares for piece in share for i in piece.rows) == list(range(500))


def test_batches_are_alike_and_full(rows):
    """Of one size, model, LoRA and number of steps; at most one of each kind is not full."""
    plan, table = Plan.of(rows[0], 8), rows[1]

    def kind(i):
        row = table[i]
        return row.get("model"), row.get("width"), row["steps"], row["prompt"]

    batches = [batch for piece in plan.pieces for batch in piece.batches]
    kinds = [{kind(i) for i in batch} for batch in batches]
    assert all(len(each) == 1 for each in kinds)
    short = [each.pop() for each, batch in zip(kinds, batches, strict=True) if len(batch) < 8]
    assert len(short) == len(set(short)) <= 54
    models = [table[batch[0]].get("model") for batch in batches]
    assert sum(a != b for a, b in itertools.pairwise(models)) == 2  # each is read once


def test_batches_are_the_same_in_shards(rows):
    files, shards = Plan.of(rows[0], 8), Plan.of(rows[0], 8, 40)
    assert [b for piece in files.pieces for b in piece.batches] == [
        b for piece in shards.pieces for b in piece.batches
    ]
    counts = [len(piece.rows) for piece in shards.pieces]
    assert max(counts) <= 40
    assert min(counts[:-1]) > 40 - 8


def test_what_is_alike_but_for_texts_and_seeds_is_one_kind(tmp_path):
    one = {"prompt": "x", "steps": 4}
    table = [one, {**one, "seed": 5}, {**one, "negative_prompt": "y"}, {**one, "target_prompt": "z"}]
    rows = read_rows([write_jsonl(tmp_path / "r.jsonl", [{**row, "id": k} for k, row in enumerate(table)])])
    assert list(rows.kinds) == [0, 0, 0, 1]


SLURM = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "2"}
ARRAY |= {"SLURM_ARRAY_TASK_COUNT": "3"}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        (SLURM, (2, 4)),
        (ARRAY, (2, 3)),
        ({**SLURM, **ARRAY}, (10, 12)),
        ({**SLURM, "RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
    ],
)
def test_who_one_is(environ, place):
    assert position(None, None, environ) == place
    assert position(3, 5, environ) == (3, 5)


@pytest.mark.parametrize("given", [(0, None), (None, 2), (2, 2), (-1, 2)])
def test_no_such_rank(given):
    with pytest.raises(UserError, match="rank"):
        position(*given, {})
