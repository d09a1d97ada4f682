"""Prompt following by captions is that of the scorer on the same pictures and prompts."""

import dataclasses

import numpy as np
from broken_pictures import scene
from PIL import Image

from ldm.evaluate.pictures import read_pictures
from ldm.files import weights_folder
from ldm.postcards.scoring.captioned import caption_following, prompts_of, write_renders
from ldm.postcards.scoring.following import following
from ldm.postcards.scoring.prompts import evaluation_prompts, reference_prompts
from ldm.postcards.scoring.scorer import Scorer
from ldm.postcards.scoring.sources import rendered

N = 12


def test_captions_are_known_by_their_text():
    prompts = [*evaluation_prompts(3), *evaluation_prompts(2, held_out=True)]
    texts = [prompt.text for prompt in prompts]
    assert [prompt.text for prompt in prompts_of([*texts[:2], "a purple unicorn", *texts[2:]])] == texts


def test_rates_are_those_of_the_prompts_whose_captions_are_known(tmp_path):
    prompts = evaluation_prompts(N)
    images = rendered([*prompts[1:], prompts[0]])  # every picture shows the next one's prompt
    for k, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        Image.fromarray(image).save(tmp_path / f"{k:02}.png")
        (tmp_path / f"{k:02}.txt").write_text(prompt.text)
    scene(0).save(tmp_path / "99.png")  # of another size, and without a caption
    found = caption_following(read_pictures(tmp_path))
    scorer = Scorer.load(weights_folder("postcard-eval"))
    want = following(prompts, scorer.read(images), scorer.config)
    assert {figure.name: figure.value for figure in found.figures} == {
        name: rate.share for name, rate in want.items()
    }
    assert any(rate.right < rate.n for rate in want.values())
    assert found.protocol["prompt_following"]["pictures"] == N


def test_other_captions_are_a_reason(tmp_path):
    scene(0).save(tmp_path / "0.png")
    (why,) = caption_following(read_pictures(tmp_path)).left_out.values()
    assert "has a caption" in why
    (tmp_path / "0.txt").write_text("a purple unicorn")
    (why,) = caption_following(read_pictures(tmp_path)).left_out.values()
    assert "evaluation prompts" in why


def test_the_reference_is_of_other_scenes(tmp_path):
    write_renders(tmp_path / "renders", "postcard", 3, (64, 64))
    pictures = read_pictures(tmp_path / "renders")
    others = reference_prompts(3)
    assert pictures.captions == tuple(prompt.text for prompt in others)
    np.testing.assert_array_equal(np.asarray(Image.open(pictures.paths[1])), rendered(others, 64)[1])
    scenes = {dataclasses.astuple(prompt.scene) for prompt in evaluation_prompts()}
    assert not scenes & {dataclasses.astuple(prompt.scene) for prompt in reference_prompts()}
