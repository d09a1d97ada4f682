"""--plot: each cell is the picture drawn alone; the sheet and its JSON."""

import json
from pathlib import Path

import numpy as np
from fake_pipeline import files
from PIL import Image

from ldm import cli
from ldm.images.png import read_request
from ldm.request import Request


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def holds(sheet, cell):
    """How often a sheet holds a cell, pixel for pixel."""
    rows, columns = (a - b + 1 for a, b in zip(sheet.shape[:2], cell.shape[:2], strict=True))
    corner = (sheet[:rows, :columns] == cell[0, 0]).all(2)
    height, width = cell.shape[:2]
    places = zip(*np.nonzero(corner), strict=True)
    return sum(np.array_equal(sheet[y : y + height, x : x + width], cell) for y, x in places)


def test_each_cell_is_the_picture_drawn_alone(tiny):
    argv = [*tiny, "--outdir", "o", "--plot", "steps=1,3; scale=1,4; sampler=euler,ddim"]
    assert cli.txt2img(argv) == 0
    assert files("o") == ["plot-0000.json", "plot-0000.png", *(f"samples/{k:05d}.png" for k in range(8))]
    told, sheet = json.loads(Path("o/plot-0000.json").read_text(encoding="utf-8")), pixels("o/plot-0000.png")
    assert told["sheet"] == "plot-0000.png"
    assert told["axes"] == [
        {"name": "steps", "values": [1, 3]},
        {"name": "scale", "values": [1.0, 4.0]},
        {"name": "sampler", "values": ["euler", "ddim"]},
    ]
    seen = set()
    for cell in told["cells"]:
        steps, scale, sampler = cell["values"]
        seen.add((steps, scale, sampler))
        alone = [
            *tiny,
            "--steps",
            str(steps),
            "--scale",
            str(scale),
            "--sampler",
            sampler,
            "-o",
            "a.png",
            "-q",
        ]
        assert cli.txt2img(alone) == 0
        drawn = pixels(Path("o", cell["file"]))
        assert np.array_equal(drawn, pixels("a.png"))
        assert holds(sheet, drawn) == 1
        request = Request.from_json(json.dumps(cell["request"]))
        assert request == read_request(Path("o", cell["file"])) == read_request("a.png")
    assert len(seen) == 8


def test_cells_lie_where_their_values_are(fake):
    fake.resolve_ = fake.resolve
    argv = ["-p", "a red sea", "-W", "64", "-H", "64", "--outdir", "o", "--format", "webp", "--lossless"]
    assert cli.txt2img([*argv, "--plot", "seed=1-3", "--plot", "prompt s/r=red,blue"]) == 0
    sheet, told = pixels("o/plot-0000.webp"), json.loads(Path("o/plot-0000.json").read_text(encoding="utf-8"))
    assert [cell["request"]["prompt"] for cell in told["cells"]] == ["a red sea"] * 3 + ["a blue sea"] * 3
    left, top = 64 + 2, sheet.shape[0] - 2 * 64 - 2
    for k, cell in enumerate(told["cells"]):
        x, y = left + k % 3 * 66, top + k // 3 * 66
        assert np.array_equal(sheet[y : y + 64, x : x + 64], pixels(Path("o", cell["file"])))
        assert cell["values"] == [k % 3 + 1, ("red", "blue")[k // 3]]
    assert sheet.shape[1] == 4 * 64 + 3 * 2
    assert sheet[:top, left:].min() < 64  # headings


def test_a_sheet_for_each_line(fake):
    Path("p").write_text(
        'a\n{"prompt": "b", "steps": 2, "seeds": [1, 2]}\n{"prompt": "c"}\n', encoding="utf-8"
    )
    assert cli.txt2img(["--from-file", "p", "--plot", "cfg=1,2", "--outdir", "o", "--skip-save"]) == 2
    assert files("o") == [f"plot-000{k}.{kind}" for k in range(2) for kind in ("json", "png")]
    told = [json.loads(Path(f"o/plot-000{k}.json").read_text(encoding="utf-8")) for k in range(2)]
    assert [[cell["request"]["prompt"] for cell in each["cells"]] for each in told] == [
        ["a", "a"],
        ["c", "c"],
    ]
    assert [cell["file"] for cell in told[0]["cells"]] == [None, None]


def test_a_random_seed_stays_the_same_in_its_row(fake):
    assert cli.txt2img(["-p", "a", "--plot", "cfg=1,2; seed=-1,-1", "--outdir", "o"]) == 0
    told = json.loads(Path("o/plot-0000.json").read_text(encoding="utf-8"))
    seeds = [cell["request"]["seeds"][0] for cell in told["cells"]]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    assert [seeds[0], seeds[2]] == told["axes"][1]["values"]


def test_a_plot_that_is_stopped_is_written_and_resumed(fake):
    argv = ["-p", "a", "--plot", "seed=1-4", "--outdir", "o", "-W", "32"]
    fake.fail_at, fake.error = 8, KeyboardInterrupt()
    assert cli.txt2img(argv) == 130
    assert files("o") == ["plot-0000.json", "plot-0000.png", "samples/00000.png", "samples/00001.png"]
    fake.fail_at = None
    fake.requests.clear()
    assert cli.txt2img([*argv, "--resume"]) == 0
    assert [request.seeds for request in fake.requests] == [(3,), (4,)]
    told = json.loads(Path("o/plot-0001.json").read_text(encoding="utf-8"))
    assert sorted(cell["file"] for cell in told["cells"]) == [f"samples/0000{k}.png" for k in range(4)]
    sheet = pixels("o/plot-0001.png")
    assert all(holds(sheet, pixels(f"o/samples/0000{k}.png")) == 1 for k in range(4))
