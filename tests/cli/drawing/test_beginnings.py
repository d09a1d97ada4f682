"""What requests begin with: another picture's, a folder's pictures, noise that is varied."""

from pathlib import Path

import pytest
from PIL import Image

from ldm import cli
from ldm.images.png import read_request


def drawn(folder="o"):
    return [read_request(path) for path in sorted(Path(folder, "samples").iterdir())]


def test_a_picture_is_drawn_as_another_was_but_for_the_flags(fake):
    assert cli.txt2img(["-p", "a boat", "-n", "fog", "-s", "7", "--steps", "2", "-o", "a.webp"]) == 0
    assert cli.txt2img(["--from-png", "a.webp", "--outdir", "same"]) == 0
    assert drawn("same") == [read_request("a.webp")]
    argv = ["--from-png", "a.webp", "-p", "a sea", "-s", "1", "--scale", "3", "-b", "2", "--outdir", "o"]
    assert cli.txt2img([*argv, "--skip-grid"]) == 0
    asked = read_request("a.webp").replace(prompt="a sea", guidance_scale=3)
    assert drawn() == [asked.replace(seeds=(1,)), asked.replace(seeds=(2,))]


def test_something_to_draw_must_be_given(fake, capsys):
    assert cli.txt2img([]) == 2
    assert "-p/--prompt --from-file is required, or --from-png" in capsys.readouterr().err


@pytest.fixture
def pictures():
    Path("in").mkdir()
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (16, 16)).save(Path("in", name))


def test_a_folder_is_drawn_from_picture_by_picture(fake, pictures):
    assert cli.txt2img(["-p", "a", "-i", "in", "--outdir", "o", "--skip-grid"]) == 0
    assert [(Path(r.image).name, r.seeds) for r in drawn()] == [("a.png", (42,)), ("b.jpg", (42,))]


def test_a_plot_is_of_one_picture(fake, pictures, capsys):
    assert cli.txt2img(["-p", "a", "-i", "in", "--plot", "cfg=1,2"]) == 2
    assert "--plot draws from one picture" in capsys.readouterr().err


def test_variations_of_one_seed(fake):
    argv = ["-p", "a", "--variation-seed", "5", "--variation-strength", "0.1", "-b", "3", "--outdir", "o"]
    assert cli.txt2img([*argv, "--skip-grid"]) == 0
    assert [(r.seeds, r.variation_seed) for r in drawn()] == [((42,), 5), ((42,), 6), ((42,), 7)]


def test_each_picture_of_a_folder_has_the_mask_of_its_name(fake, pictures, capsys):
    Path("masks").mkdir()
    Image.new("L", (16, 16), 255).save("masks/a.png")
    argv = ["-p", "a", "-i", "in", "--mask", "masks", "--outdir", "o", "--skip-grid"]
    assert cli.txt2img(argv) == 2
    assert "masks has no mask for b.jpg" in capsys.readouterr().err
    Image.new("L", (16, 16), 255).save("masks/b.png")
    assert cli.txt2img(argv) == 0
    assert [Path(r.mask_image).name for r in drawn()] == ["a.png", "b.png"]
    Path("empty").mkdir()
    assert cli.txt2img(["-p", "a", "-i", "empty"]) == 2
    assert "no pictures in empty" in capsys.readouterr().err


def test_each_seed_chooses_from_a_template(fake):
    from ldm.prompts.wildcards import expand

    Path("words").mkdir()
    Path("words/animal.txt").write_text("cat\ndog\nhorse\n", encoding="utf-8")
    template = "a {red|blue} __animal__"
    argv = ["-p", template, "--wildcards", "words", "-s", "3", "-b", "4", "--outdir", "o", "--skip-grid"]
    assert cli.txt2img(argv) == 0
    assert [(r.prompt, r.seeds) for r in drawn()] == [
        (expand(template, seed, "words"), (seed,)) for seed in range(3, 7)
    ]
    assert cli.txt2img(["-p", template, "-b", "2", "--outdir", "plain", "--skip-grid"]) == 0
    assert {r.prompt for r in drawn("plain")} == {template}


def test_a_picture_of_automatic1111_begins_with_its_noise(tmp_path):
    """Its own settings say where noise comes from: Philox, a variation, the seed of another size."""
    import torch
    from PIL.PngImagePlugin import PngInfo

    import ldm
    from ldm.diffusion.noise import Noise, slerp
    from ldm.diffusion.philox import Philox

    text = PngInfo()
    text.add_text(
        "parameters",
        "a boat\nSteps: 2, Sampler: Euler, Schedule type: Karras, CFG scale: 3, Seed: 0, Size: 128x128, "
        "Variation seed: 9, Variation seed strength: 0.25, Version: v1.10.1",
    )
    Image.new("RGB", (128, 128)).save(tmp_path / "theirs.png", pnginfo=text)
    pipe = ldm.load(device="cpu", dtype="fp32")
    job = pipe.prepare(read_request(tmp_path / "theirs.png"))
    begun = Noise([job.pictures[0].source]).first(job.start.shape)
    shape = (1, *job.start.shape)
    wanted = slerp(Philox(0).randn(shape), Philox(9).randn(shape), 0.25)
    assert torch.equal(begun, wanted)
    torch.testing.assert_close(Philox(0).randn(shape).flatten()[:2], torch.tensor([-0.92466259, -0.42534415]))
