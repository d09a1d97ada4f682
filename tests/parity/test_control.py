"""Drawing with control pictures, against diffusers' pipelines of the same tiny random weights, in fp32."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipeline import randomise

import ldm

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
HINT = {"conditioning_embedding_out_channels": (4, 8)}  # the tiny VAE halves pictures once
STEPS = 4
TEXT = "the red boat"


def picture(seed=1, size=(16, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def control_of(unet, seed, cls=diffusers.ControlNetModel, **changes):
    """A ControlNet for a U-Net, all of whose weights are random."""
    torch.manual_seed(seed)
    return randomise(cls.from_unet(unet, **HINT | changes)).eval()


@pytest.fixture(scope="module")
def sd1(families):
    return families("sd1")


@pytest.fixture(scope="module")
def models_of(families):
    """Our pipelines by family."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = ldm.load(families(name)[0], device="cpu", dtype="fp32")
        return made[name]

    return get


@pytest.fixture(scope="module")
def nets(sd1, tmp_path_factory):
    """Two ControlNets of sd1, as diffusers' modules and as folders."""
    root, found = tmp_path_factory.mktemp("controls"), []
    for seed in (1, 2):
        net = control_of(sd1[1].unet, seed)
        net.save_pretrained(root / str(seed))
        found.append((net, str(root / str(seed))))
    return found


def peer_of(peer, name, **more):
    """diffusers' pipeline of that class, of the parts of another; PNDM, which counts a step twice, becomes
    DDIM.
    """
    parts = {part: getattr(peer, part) for part in PARTS} | more
    if isinstance(peer.scheduler, diffusers.PNDMScheduler):
        parts["scheduler"] = diffusers.DDIMScheduler.from_config(
            peer.scheduler.config, clip_sample=False, set_alpha_to_one=False
        )
    if "XL" in name:
        parts |= {part: getattr(peer, part) for part in ("text_encoder_2", "tokenizer_2")}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    made = getattr(diffusers, name)(**parts)
    made.set_progress_bar_config(disable=True)
    return made


def theirs(pipe, **arguments):
    return pipe(
        TEXT,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        **arguments,
    ).images


def ours(pipe, **arguments):
    sampler = "ddim" if "time_ids" not in pipe.unet.config.conditioning else None
    return pipe(
        TEXT, num_inference_steps=STEPS, seed=5, output_type="latent", sampler=sampler, **arguments
    ).images


def error(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(
    ("fields", "called"),
    [
        ({}, {}),
        ({"scale": 0.4}, {"controlnet_conditioning_scale": 0.4}),
        ({"start": 0.25, "end": 0.75}, {"control_guidance_start": 0.25, "control_guidance_end": 0.75}),
        ({"mode": "guess", "scale": 0.7}, {"guess_mode": True, "controlnet_conditioning_scale": 0.7}),
    ],
    ids=["plain", "strength", "start and end", "guess mode"],
)
def test_a_controlnet(sd1, nets, models_of, fields, called):
    peer = peer_of(sd1[1], "StableDiffusionControlNetPipeline", controlnet=nets[0][0])
    expected = theirs(peer, image=picture(), guidance_scale=4.0, **called)
    pipe = models_of("sd1")
    use = {"model": nets[0][1], "image": picture(), **fields}
    assert error(ours(pipe, control=[use], guidance_scale=4.0), expected) < 1e-4
    by_names = ours(pipe.with_controlnet(nets[0][1]), control_image=picture(), guidance_scale=4.0, **called)
    assert error(by_names, expected) < 1e-4
    assert error(ours(pipe, guidance_scale=4.0), expected) > 1e-3


def test_two_controlnets(sd1, nets, models_of):
    peer = peer_of(sd1[1], "StableDiffusionControlNetPipeline", controlnet=[net for net, _ in nets])
    shared = {"controlnet_conditioning_scale": [0.4, 0.9], "control_guidance_end": [1.0, 0.5]}
    expected = theirs(peer, image=[picture(1), picture(2)], control_guidance_start=[0.25, 0.0], **shared)
    pipe = models_of("sd1").with_controlnet(*(path for _, path in nets))
    found = ours(pipe, control_image=[picture(1), picture(2)], control_guidance_start=[0.25, 0.0], **shared)
    assert error(found, expected) < 1e-4


def test_from_an_image(sd1, nets, models_of):
    peer = peer_of(sd1[1], "StableDiffusionControlNetImg2ImgPipeline", controlnet=nets[0][0])
    shared = {
        "strength": 0.6,
        "control_guidance_end": 0.6,
        "image": picture(3),
        "controlnet_conditioning_scale": 0.8,
    }
    expected = theirs(peer, control_image=picture(), **shared)
    found = ours(models_of("sd1").with_controlnet(nets[0][1]), control_image=picture(), **shared)
    assert error(found, expected) < 1e-4


@pytest.mark.parametrize("family", ["sd1", "inpaint"])
def test_inpainting(families, models_of, tmp_path, family):
    """What is masked is -1 in the control picture; an inpainting model's control sees latents alone."""
    _, peer = families(family)
    net = control_of(families("sd1")[1].unet, 3)
    net.save_pretrained(tmp_path)
    mask = Image.fromarray(np.pad(np.full((9, 16), 255, dtype=np.uint8), ((7, 0), (0, 0))))
    hidden = torch.from_numpy(np.array(picture(3))).movedim(-1, 0)[None] / 255
    hidden[..., 7:, :] = -1
    peer = peer_of(peer, "StableDiffusionControlNetInpaintPipeline", controlnet=net)
    shared = {"image": picture(3), "mask_image": mask, "strength": 1.0, "height": 16, "width": 16}
    expected = theirs(peer, control_image=hidden, controlnet_conditioning_scale=1.0, **shared)
    use = {"model": str(tmp_path), "preprocess": "inpaint"}
    assert error(ours(models_of(family), control=[use], **shared), expected) < 1e-4


def test_a_controlnet_of_xl(families, models_of, tmp_path):
    _, peer = families("sdxl")
    net = control_of(peer.unet, 4)
    net.save_pretrained(tmp_path)
    expected = theirs(peer_of(peer, "StableDiffusionXLControlNetPipeline", controlnet=net), image=picture())
    use = {"model": str(tmp_path), "image": picture()}
    assert error(ours(models_of("sdxl"), control=[use]), expected) < 1e-4


@pytest.mark.parametrize("kinds", [(1,), (1, 3)])
def test_a_union(families, models_of, tmp_path, kinds):
    _, peer = families("sdxl")
    own = control_of(peer.unet, 4).config
    union = {"num_trans_channel": 16, "num_trans_head": 2, "num_proj_channel": 16, "num_control_type": 8}
    given = {k: v for k, v in own.items() if k != "mid_block_type" and not k.startswith("_")}
    torch.manual_seed(6)
    net = randomise(diffusers.ControlNetUnionModel(**given | union)).eval()
    net.save_pretrained(tmp_path)
    pipe = peer_of(peer, "StableDiffusionXLControlNetUnionPipeline", controlnet=net)
    pictures = [picture(seed) for seed in kinds]
    scales = [0.5, 0.8][: len(kinds)]
    expected = theirs(
        pipe, control_image=list(pictures), control_mode=list(kinds), controlnet_conditioning_scale=scales
    )
    names = {1: "depth", 3: "lineart"}
    uses = [
        {"model": str(tmp_path), "image": image, "type": names[kind], "scale": scale}
        for image, kind, scale in zip(pictures, kinds, scales, strict=True)
    ]
    assert error(ours(models_of("sdxl"), control=uses), expected) < 1e-4


@pytest.mark.parametrize(
    ("family", "kind", "factor", "name"),
    [
        ("sd1", "full_adapter", 2, "StableDiffusionAdapterPipeline"),
        ("sdxl", "full_adapter_xl", 4, "StableDiffusionXLAdapterPipeline"),
    ],
)
def test_an_adapter(families, models_of, tmp_path, family, kind, factor, name):
    _, peer = families(family)
    torch.manual_seed(7)
    net = randomise(diffusers.T2IAdapter(3, [16, 32], 2, factor, kind)).eval()
    net.save_pretrained(tmp_path)
    pipe = peer_of(peer, name, adapter=net)
    expected = theirs(pipe, image=picture(), adapter_conditioning_scale=0.6)
    found = ours(
        models_of(family).with_controlnet(tmp_path), control_image=picture(), adapter_conditioning_scale=0.6
    )
    assert error(found, expected) < 1e-4


def test_a_depth_model(sd1, tmp_path):
    peer = sd1[1]
    config = {name: value for name, value in peer.unet.config.items() if not name.startswith("_")}
    unet = randomise(diffusers.UNet2DConditionModel(**config | {"in_channels": 5})).eval()
    parts = {part: getattr(peer, part) for part in ("vae", "text_encoder", "tokenizer")}
    scheduler = diffusers.DDIMScheduler.from_config(
        peer.scheduler.config, clip_sample=False, set_alpha_to_one=False
    )
    pipe = diffusers.StableDiffusionDepth2ImgPipeline(
        **parts, unet=unet, scheduler=scheduler, depth_estimator=None, feature_extractor=None
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "model")
    depth = picture(8, (20, 12)).convert("L")
    depth.save(tmp_path / "depth.png")
    levels = torch.from_numpy(np.array(depth)).float()[None]
    shared = {"image": picture(3), "strength": 0.6}
    expected = theirs(pipe, depth_map=levels, **shared)
    own = ldm.load(tmp_path / "model", device="cpu", dtype="fp32")
    use = {"model": "depth", "image": str(tmp_path / "depth.png")}
    assert error(ours(own, control=[use], **shared), expected) < 1e-4
    assert error(ours(own, control=[use | {"image": depth}], **shared), expected) < 1e-4
    own.save(tmp_path / "one.safetensors")
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        header = file.metadata()
    estimator = {"depth_model.model.pretrained.cls_token": torch.zeros(1)}  # which published files hold
    save_file(load_file(tmp_path / "one.safetensors") | estimator, tmp_path / "one.safetensors", header)
    single = ldm.load(tmp_path / "one.safetensors", device="cpu", dtype="fp32")
    assert error(ours(single, control=[use], **shared), expected) < 1e-4
    own.save(tmp_path / "saved")
    nothing = {"depth_estimator": None, "feature_extractor": None}  # which none is saved with
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved", **nothing)
    assert type(again) is type(pipe)
    with pytest.raises(ldm.UserError, match="this model draws with a depth map: give one"):
        ours(own, **shared)
