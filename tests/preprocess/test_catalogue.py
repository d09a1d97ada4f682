"""Preprocessors by name, their options, and networks of folders."""

import sys

import numpy as np
import pytest
import torch
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessorPil,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
)

from ldm.errors import UserError
from ldm.preprocess import PREPROCESSORS, find, preprocess, read_options
from ldm.preprocess.networks import load_estimator

pytest.importorskip("cv2", reason="no OpenCV: pip install 'ldm[control]'", exc_type=ImportError)
SIZES = [(24, 36), (1, 1), (1, 9), (9, 1), (2, 3)]


def picture(size=(30, 52), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)


@pytest.mark.parametrize("name", PREPROCESSORS)
@pytest.mark.parametrize("size", SIZES)
def test_every_size_gives_a_picture_of_that_size(name, size):
    given = picture(size)
    before = given.copy()
    extra = {"estimator": lambda x: np.zeros(x.shape[:2], np.float32)} if name == "seg" else {}
    found = preprocess(given, name, mask=np.zeros(size, np.float32), **extra)
    assert found.dtype == np.uint8
    assert found.shape == (*size, 4 if name == "inpaint" else 3)
    assert np.array_equal(given, before), "it is not written to"


def test_names_in_any_spelling():
    for name, each in PREPROCESSORS.items():
        assert find(name) is each
        assert find(name.upper().replace("_", "-")) is each
    assert find("Scribble").name == "scribble_xdog"
    assert find("t2ia_color_grid").name == "color"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cany", "did you mean canny"),
        ("softedge_hed", "take softedge"),
        ("depth_midas", "depth with --depth-model"),
        ("openpose_full", "finished pose"),
    ],
)
def test_a_name_that_is_not_here(name, said):
    with pytest.raises(UserError, match=said):
        find(name)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("canny", {"low": -1}, "canny: low -1 is not allowed: a number from 0 to 2040"),
        ("canny", {"high": "nan"}, "high nan is not allowed"),
        ("canny", {"sigma": 1}, "unknown option of canny 'sigma'"),
        ("color", {"cell": 2.5}, "a whole number from 1 to 1024"),
        ("depth", {"far_is_white": 2}, "it is on or off"),
        ("invert", {"low": 1}, "invert has no options"),
    ],
)
def test_options_beyond_their_bounds(name, given, said):
    with pytest.raises(UserError, match=said):
        read_options(name, given)
    with pytest.raises(UserError, match=said):
        preprocess(picture(), name, **given)


def test_options_as_text():
    assert read_options("canny", {"low": "50", "high": "80.5"}) == {"low": 50.0, "high": 80.5}
    assert read_options("normal", {"far_is_white": "on", "relief": "1"}) == {
        "far_is_white": True,
        "relief": 1.0,
    }
    assert read_options("color", {"cell": "16"}) == {"cell": 16}


@pytest.mark.parametrize(
    "given",
    [picture()[..., 0], picture().astype(np.float32), picture()[:0], np.zeros((4, 4, 4), np.uint8)],
)
def test_what_is_no_picture(given):
    with pytest.raises(UserError, match=r"uint8 \[height, width, 3\]"):
        preprocess(given, "canny")


def test_without_opencv(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"pip install 'ldm\[control\]'"):
        preprocess(picture(), "canny")
    assert preprocess(picture(), "depth").shape == (30, 52, 3), "numpy is enough for it"


# --- networks --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def depth_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("depth")
    sizes = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2}
    stages = [f"stage{i}" for i in range(1, 5)]
    backbone = Dinov2Config(
        **sizes, image_size=28, patch_size=14, out_features=stages, reshape_hidden_states=False
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=8,
        neck_hidden_sizes=[4] * 4,
        fusion_hidden_size=4,
        head_hidden_size=4,
    )
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    size = {"height": 28, "width": 28}
    DPTImageProcessorPil(size=size, keep_aspect_ratio=True, ensure_multiple_of=14).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def segmentation_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("segmentation")
    layers = {"depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "patch_sizes": [7, 3]}
    heads = {"strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
    config = SegformerConfig(num_encoder_blocks=2, **layers, **heads, decoder_hidden_size=8, num_labels=5)
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_depth_by_a_network_of_a_folder(depth_folder):
    """As the model and its processor say it, put together by hand."""
    model = DepthAnythingForDepthEstimation.from_pretrained(depth_folder).eval()
    processor = DPTImageProcessorPil.from_pretrained(depth_folder)
    with torch.inference_mode():
        answer = model(**processor(images=picture(), return_tensors="pt")).predicted_depth
    large = torch.nn.functional.interpolate(answer[None], (30, 52), mode="bicubic", align_corners=False)[0, 0]
    estimator = load_estimator("depth", depth_folder)
    found = estimator(picture())
    assert found.shape == (30, 52)
    assert np.ptp(found) > 0
    np.testing.assert_allclose(found, large.numpy(), atol=1e-5)
    stretched = (found - found.min()) / np.ptp(found) * 255
    assert np.abs(preprocess(picture(), "depth", estimator=estimator)[..., 0] - stretched).max() <= 0.51


def test_segmentation_by_a_network_of_a_folder(segmentation_folder):
    estimator = load_estimator("segmentation", segmentation_folder)
    classes = estimator(picture())
    assert classes.shape == (30, 52)
    assert {*np.unique(classes)} <= {0, 1, 2, 3, 4}
    found = preprocess(picture(), "seg", estimator=estimator)
    assert len(np.unique(found.reshape(-1, 3), axis=0)) == len(np.unique(classes))


def test_folders_that_hold_no_network(depth_folder, segmentation_folder, tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_estimator("depth", tmp_path)
    with pytest.raises(UserError, match=r"--depth-model .* cannot be read"):
        load_estimator("depth", segmentation_folder)
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((depth_folder / name).read_bytes())
    with pytest.raises(UserError, match=r"--depth-model .* cannot be read"):
        load_estimator("depth", tmp_path)
