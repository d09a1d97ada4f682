"""CLIP's towers give what transformers gives, whatever the batch; what is no CLIP is said to be none."""

import json

import numpy as np
import pytest
import torch
from broken_pictures import scene
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import SIDE, WIDTH, make_clip, make_tower
from torchmetrics.functional.multimodal import clip_score
from transformers import CLIPModel, CLIPProcessor

from ldm.errors import UserError
from ldm.evaluate.features import ImageTower, unit

CAPTIONS = ["the red boat", "a sea", "boat " * 30]
IMAGES = [scene(k, size) for k, size in enumerate([(40, 40), (64, 48), (32, 90)])]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "whole"
    make_clip(folder)
    return folder


@pytest.fixture(scope="module")
def peer(clip_folder):
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    processor.tokenizer.model_max_length = 16
    return model.eval(), processor


class AsTorchmetricsKnowsIt(torch.nn.Module):
    """transformers 5 gives features inside an output, which torchmetrics 1.9 does not expect."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels):
        return self.model.get_image_features(pixels).pooler_output

    def get_text_features(self, ids, mask):
        return self.model.get_text_features(ids, mask).pooler_output


def test_scores_are_torchmetrics_on_the_same_clip(clip_folder, peer):
    clip, theirs = ImageTower.load(clip_folder), (AsTorchmetricsKnowsIt(peer[0]), peer[1])
    ours = 100 * (unit(clip.features(IMAGES)) * unit(clip.texts(CAPTIONS))).sum(axis=1)
    assert np.ptp(ours) > 1
    assert max(ours[:2]) > 0
    for image, caption, score in list(zip(IMAGES, CAPTIONS, ours, strict=True))[:2]:  # it cuts no long text
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
        expected = clip_score(pixels, caption, model_name_or_path=lambda: theirs).detach()
        assert max(score, 0) == pytest.approx(float(expected), abs=1e-3)


def test_embeddings_are_transformers_own(clip_folder, peer):
    model, processor = peer
    inputs = processor(
        text=CAPTIONS, images=IMAGES, return_tensors="pt", padding="max_length", truncation=True
    )
    with torch.no_grad():
        out = model(**inputs)
    clip = ImageTower.load(clip_folder)
    np.testing.assert_allclose(clip.embed(IMAGES), out.image_embeds, atol=1e-5)
    np.testing.assert_allclose(unit(clip.texts(CAPTIONS)), out.text_embeds, atol=1e-5)


def test_batches_change_nothing(clip_folder):
    clip = ImageTower.load(clip_folder)
    whole = clip.features(IMAGES)
    assert whole.shape == (3, WIDTH)
    np.testing.assert_allclose(clip.features(IMAGES, batch_size=1), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(clip.texts(CAPTIONS, batch_size=2), clip.texts(CAPTIONS), rtol=1e-5, atol=1e-6)


def test_the_protocol_tells_what_decides_the_features(clip_folder):
    said = ImageTower.load(clip_folder).protocol()
    assert len(said["sha256"]) == 64
    assert said["dims"] == WIDTH
    assert said["preprocessing"]["resample"] == "bicubic"
    assert said["preprocessing"]["crop_size"] == {"height": SIDE, "width": SIDE}
    assert json.dumps(said)


def test_the_embedded_tower_squashes_pictures_to_its_own_size():
    tower = ImageTower.embedded()
    picture = scene(3, (200, 100))
    said = tower.protocol()["preprocessing"]
    assert "crop_size" not in said
    assert said["size"] == {"height": 128, "width": 128}
    squashed = picture.resize((128, 128), Image.Resampling.BILINEAR)
    with torch.no_grad():
        x = torch.from_numpy(np.asarray(squashed).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        expected = tower.model(pixel_values=x).image_embeds
    np.testing.assert_allclose(tower.features([picture]), expected, rtol=1e-4, atol=1e-4)


# --- what is no CLIP -------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path):
    make_tower(tmp_path / "clip")
    return tmp_path / "clip"


def refused(folder, match):
    with pytest.raises(UserError, match=match) as error:
        ImageTower.load(folder)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_none(tmp_path, tiny_folder):
    refused(tmp_path / "none", "no CLIP folder: it has no config.json")
    refused(tiny_folder / "text_encoder", "model_type 'clip_text_model'")
    refused(tiny_folder / "vae", "model_type None")


def test_damaged_weights(broken):
    (broken / "model.safetensors").write_bytes(b"no weights")
    refused(broken, "cannot read the CLIP in")


def test_a_missing_tensor(broken):
    tensors = load_file(broken / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    refused(broken, "lacks visual_projection.weight")


def test_features_that_are_no_numbers(broken):
    tensors = load_file(broken / "model.safetensors")
    tensors["visual_projection.weight"][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="gives NaN or Inf for 3 of 3"):
        ImageTower.load(broken).features(IMAGES)


def test_without_its_preprocessing_clip_s_own_is_used_and_said(broken):
    (broken / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match=f"CLIP's own at {SIDE} pixels"):
        tower = ImageTower.load(broken)
    assert tower.protocol()["preprocessing"]["image_mean"][0] == pytest.approx(0.48145466)
    assert tower.features(IMAGES).shape == (3, WIDTH)
