"""The table of guidances, on pipelines whose pictures are known."""

from types import SimpleNamespace

import pytest
import torch

from ldm.diffusion.guidances.catalogue import GUIDANCES, canonical_guidance
from ldm.evaluate.features import EVALUATION
from ldm.files import weights_folder
from ldm.postcards.comparisons import guidances
from ldm.postcards.comparisons.guidances import NAMES, SCALES, compare, markdown, seconds_of
from ldm.postcards.scoring.prompts import evaluation_prompts, reference_prompts
from ldm.postcards.scoring.scorer import Scorer
from ldm.postcards.scoring.sources import rendered

COUNT = 8


class Draws:
    """Renders of the prompts' own scenes where the guidance is at its `best` scale, else grey pictures."""

    def __init__(self, best):
        self.best, self.asked = best, []
        self.scenes = {each.text: each for each in (*evaluation_prompts(COUNT), *reference_prompts(COUNT))}

    def __call__(self, prompts, seed, guidance, guidance_scale, output_type="pil"):
        self.asked.append((guidance, guidance_scale))
        if isinstance(prompts, str):
            return None
        images = torch.from_numpy(rendered([self.scenes[text] for text in prompts])).movedim(-1, 1) / 255
        images = images if self.best[guidance] == guidance_scale else torch.full_like(images, 0.5)
        return SimpleNamespace(images=images)


@pytest.fixture(scope="module")
def scorer():
    return Scorer.load(weights_folder(EVALUATION))


def test_each_is_drawn_at_the_scale_that_follows_prompts_best(scorer):
    pipe, rows = Draws({"cfg": 4.0, "apg": 1.5, "tcfg": None}), {}
    compare(
        pipe, scorer, COUNT, ("cfg", "apg", "tcfg"), {}, lambda name, row, images: rows.update({name: row})
    )
    assert [rows[name]["scale"] for name in ("cfg", "apg")] == [4.0, 1.5]
    assert rows["cfg"]["difference"] == rows["apg"]["difference"] == 0
    assert rows["cfg"]["following"] > 90
    assert rows["cfg"]["frechet"] == pytest.approx(0, abs=1e-3)
    assert rows["tcfg"]["difference"] < -20
    assert rows["tcfg"]["frechet"] > 10
    assert pipe.asked[:4] == [*(("cfg", scale) for scale in SCALES), ("cfg", 4.0)]


def test_rows_that_are_there_are_not_drawn_again(scorer):
    pipe, rows = Draws({"cfg": 4.0, "apg": 1.5}), {}
    known = {"cfg": {"scale": 4.0}, "apg": {"scale": 1.5}}
    compare(pipe, scorer, COUNT, ("cfg", "apg"), known, lambda name, row, images: rows.update({name: row}))
    assert rows.keys() == {"cfg"}
    assert set(pipe.asked) == {("cfg", 4.0)}


def test_the_table_tells_what_was_measured():
    row = {"scale": 2.5, "following": 81.26, "difference": 0.0, "low": 0.0, "high": 0.0, "frechet": 3.456}
    figures = {
        "cfg": dict(row),
        "apg": row | {"following": 82.0, "difference": 0.74, "low": -1.0, "high": 2.0},
    }
    assert markdown(figures).splitlines()[2:] == [
        "| `cfg` | 2.5 | 81.3 |  | 3.46 |  |  |",
        "| `apg` | 2.5 | 82.0 | +0.7 (-1.0 to +2.0) | 3.46 |  |  |",
    ]
    timed = seconds_of(Draws({}), figures, 2)
    assert all(each["seconds"] >= 0 and each["rounds"] == 2 for each in timed.values())
    assert "| 1.00 |" in markdown({name: each | {"seconds": 0.5} for name, each in timed.items()})


def test_all_names_are_in_it():
    assert [canonical_guidance(text).partition(":")[0] for text in NAMES] == list(GUIDANCES)
    assert NAMES[0] == "cfg"
    assert guidances.HEAD[1] == "scale"
