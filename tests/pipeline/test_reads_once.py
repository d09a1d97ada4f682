"""A picture to begin with is read and decoded once for all pictures of a call."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm import cli
from ldm.images import provenance


@pytest.fixture
def start(tmp_path):
    """The file of a picture."""
    levels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "start.png")
    return tmp_path / "start.png"


@pytest.fixture
def reads(start, monkeypatch):
    """What was done to that file, in order: "read" for its bytes, "decode" for its pixels."""
    done = []
    provenance._marks_of_file.cache_clear()  # another test may have looked at the same bytes
    opened, image_open = Path.open, Image.open

    def count_open(self, *args, **kwargs):
        done.extend(["read"] * (Path(self) == start))
        return opened(self, *args, **kwargs)

    def open_image(what, *args, **kwargs):
        image = image_open(what, *args, **kwargs)
        done.append("decode")
        return image

    monkeypatch.setattr(Path, "open", count_open)
    monkeypatch.setattr(Image, "open", open_image)
    return done


TINY = {"height": 16, "width": 16, "num_inference_steps": 2, "strength": 0.5}


def test_ten_batches_of_the_command(tiny_folder, start, reads, tmp_path):
    flags = ["-m", str(tiny_folder), "-p", "the red boat", "--steps", "2", "-W", "16", "-H", "16"]
    flags += ["--device", "cpu", "--dtype", "fp32", "--outdir", str(tmp_path / "out"), "--quiet"]
    assert cli.txt2img([*flags, "-i", str(start), "-b", "10"]) == 0
    assert reads == ["read", "decode"] * 2  # to draw, and for what it says of its origin
    assert len(list((tmp_path / "out").glob("**/0000?.png"))) == 10


@pytest.mark.parametrize("as_text", [True, False])
def test_eight_prompts(tiny_folder, start, reads, as_text):
    pipe = ldm.load(tiny_folder, device="cpu", dtype="fp32")
    prompts = [f"the red boat {k}" for k in range(8)]
    image = str(start) if as_text else start
    drawn = pipe(prompts, image=image, seed=3, output_type="pt", **TINY).images
    assert reads == ["read", "decode"]
    alone = pipe(prompts[5], image=image, seed=8, output_type="pt", **TINY).images
    assert torch.allclose(drawn[5:6], alone, atol=1e-5)


def test_a_generator_with_a_wide_seed_is_drawn_again_from_the_request(tiny_folder):
    """It takes in 32 bits of its seed, and those the request keeps."""
    pipe = ldm.load(tiny_folder, device="cpu", dtype="fp32")
    size = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "pt"}
    wide = torch.Generator().manual_seed(2**40 + 7)
    result = pipe("the red boat", generator=wide, **size)
    assert result.seeds == (7,)
    assert torch.equal(pipe.generate(result.request, output_type="pt").images, result.images)
