"""What users of diffusers type: each line works, or its error names what to write here."""

import dataclasses
import re
from collections.abc import Sequence

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_adapters import save_diffusers
from tiny_pipeline import make_folder

import ldm
from ldm import cli
from ldm.cli.draw import add_flags
from ldm.cli.flags import FLAGS
from ldm.cli.parser import Parser
from ldm.pipeline import Inputs
from ldm.pipeline.diffusers_names import HARMLESS, INSTEAD
from ldm.request import Request


def picture(seed=1, side=16):
    levels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(levels)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the lines of code may name."""
    root = tmp_path_factory.mktemp("snippets")
    theirs = make_folder(root / "model")
    pipe = ldm.load(root / "model", device="cpu", dtype="fp32")
    with torch.no_grad():
        embeds = pipe.text.encode(["sea"]).tokens
    return {
        "ldm": ldm,
        "Pipeline": ldm.Pipeline,
        "torch": torch,
        "np": np,
        "diffusers": diffusers,
        "theirs": theirs,
        "path": str(root / "model"),
        "out": str(root / "saved"),
        "lora": str(save_diffusers(theirs, root / "lora.safetensors")),
        "pipe": pipe,
        "few": {"num_inference_steps": 2, "output_type": "latent"},
        "img": picture(),
        "img2": picture(2),
        "embeds": embeds,
        "cpu": {"device": "cpu"},
    }


WORKS = """
    pipe("sea", generator=torch.Generator().manual_seed(0), **few)
    pipe("sea", generator=[torch.Generator().manual_seed(0)], **few)
    pipe(["sea", "boat"], negative_prompt=["red", "the"], **few)
    pipe("sea", num_images_per_prompt=2, **few)
    pipe("sea", num_inference_steps=2, output_type="latent")
    pipe("sea", callback_on_step_end=lambda p, i, t, kwargs: {}, **few)
    pipe("sea", callback_on_step_end=lambda p, i, t, kwargs: kwargs, **few)
    pipe("sea", callback_on_step_end=lambda p, i, t, kwargs: {"latents": kwargs["latents"].half()}, **few)
    pipe("sea", timesteps=torch.tensor([900, 500, 100]), output_type="latent")
    pipe("sea", sigmas=np.array([10.0, 1.0, 0.0]), output_type="latent")
    pipe("sea", latents=torch.randn(1, 4, 8, 8, dtype=torch.float16), **few)
    pipe("sea", image=img, **few)
    pipe("sea", sampler="DPMSolverMultistepScheduler", **few)
    pipe("sea", clip_skip=1, **few)
    pipe("sea", eta=0.0, **few)
    pipe.to_diffusers()
    pipe.to("cpu")
    pipe.to(torch.float16)
    pipe.to("cpu", torch.bfloat16)
    pipe.to(device="cpu", dtype=torch.float16, silence_dtype_warnings=True)
    ldm.load(path, torch_dtype=torch.float16, safety_checker=None, **cpu)
    ldm.load(path, torch_dtype="auto", use_safetensors=True, low_cpu_mem_usage=True, **cpu)
    Pipeline.from_pretrained(path, requires_safety_checker=False, feature_extractor=None, **cpu)
    Pipeline.from_single_file(path, load_safety_checker=False, cache_dir=None, **cpu)
    pipe.set_progress_bar_config(disable=True)
    pipe("sea", callback_on_step_end_tensor_inputs=["latents"], **few)
    pipe("sea", callback_on_step_end_tensor_inputs=["prompt_embeds", "negative_prompt_embeds"], **few)
    pipe("sea", callback_on_step_end=lambda p, i, t, kwargs: {"stop": True}, **few)
    pipe("sea", **few)[0]
    pipe("sea", return_dict=False, **few)[0]
    pipe("sea", **few)["images"]
    pipe("sea", **few).nsfw_content_detected
    pipe.vae.decode(torch.zeros(1, 4, 8, 8) / pipe.vae.config.scaling_factor).sample
    pipe.vae.decode(torch.zeros(1, 4, 8, 8) / pipe.vae.config.scaling_factor, return_dict=False)[0]
    pipe.vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist.sample() * pipe.vae.config.scaling_factor
    pipe("sea", image=np.asarray(img), **few)
    pipe("sea", image=[img], **few)
    pipe(["sea", "boat"], image=[img, img2], **few)
    pipe("sea", image=[img, img2], **few)
    pipe("sea", image=torch.rand(2, 3, 16, 16), **few)
    pipe("sea", image=torch.randn(1, 4, 8, 8), **few)
    pipe("sea", seed=np.int64(3), **few)
    pipe("sea", seed=torch.tensor(3), **few)
    pipe("sea", seed=np.array([3]), **few)
    pipe("sea", cross_attention_kwargs={"scale": 0.5}, **few)
    pipe.with_lora(lora)("sea", cross_attention_kwargs={"scale": 0.5}, **few)
    pipe("sea", guidance_rescale=0.5, guidance_scale=3, **few)
    pipe(prompt_embeds=embeds, negative_prompt_embeds=embeds, **few)
    pipe(prompt_embeds=torch.cat([embeds, embeds]), negative_prompt_embeds=torch.cat([embeds, embeds]), **few)
    pipe(np.array(["sea", "boat"]), **few)
    pipe.save_pretrained(out, safe_serialization=True)
    pipe.to("cpu").unet.compile(backend="eager")
    pipe.compiled(backend="eager")("sea", **few)
    pipe.tokenizer("sea").input_ids
    pipe.text_encoder.config.hidden_size
    pipe.device.type, pipe.dtype, pipe.vae.config.scaling_factor, pipe.unet.config.sample_size
"""

# What is typed -> what the error must name.
SAYS = [
    ('pipe.to("cuda:9")', "is not there"),
    ("pipe.cuda(9)", "is not there"),
    ("pipe.to(torch.int8)", "bf16, fp16 or fp32"),
    ("pipe.to('cpu', non_blocking=True)", "a device, a dtype"),
    ("ldm.load(path, safety_checker=theirs, **cpu)", "there is none"),
    ("ldm.load(path, cache_dir='here', **cpu)", "HF_HOME"),
    ("ldm.load(path, token='hf_x', **cpu)", "hf auth login"),
    ("ldm.load(path, device_map='balanced', **cpu)", "device="),
    ("ldm.load(path, custom_pipeline='lpw', **cpu)", "never runs"),
    ("ldm.load(path, scheduler=theirs.scheduler, **cpu)", "sampler"),
    ("ldm.load(path, vae=theirs.vae, **cpu)", "vae=PLACE"),
    ("ldm.load(path, use_safetensors=False, **cpu)", "leave it out"),
    ("ldm.load(path, dtype='fp16', torch_dtype=torch.float32, **cpu)", "dtype alone"),
    ("ldm.load(path, subfolder='unet', **cpu)", "unet="),
    ("ldm.load(path, dtipe='fp16', **cpu)", "did you mean dtype"),
    ("pipe.load_lora_weights(lora)", "with_lora"),
    ("pipe.fuse_lora()", "pipe.fuse()"),
    ("pipe.unload_lora_weights()", "pipe.base"),
    ("pipe.set_adapters(['a'], [0.5])", "with_lora"),
    ("pipe.load_textual_inversion(lora)", "with_embedding"),
    ("pipe.load_ip_adapter('h94/IP-Adapter')", "image with strength"),
    ("pipe.scheduler.config", "sampler"),
    (
        "setattr(pipe, 'scheduler', diffusers.EulerDiscreteScheduler.from_config(theirs.scheduler.config))",
        'sampler="euler"',
    ),
    (
        "setattr(pipe, 'scheduler', diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True))",
        'sampler="dpmpp_2m", spacing="karras"',
    ),
    ("setattr(pipe, 'unet', torch.compile(pipe.unet))", "pipe.compiled()"),
    ("setattr(pipe, 'vae', theirs.vae)", "vae=PLACE"),
    ("setattr(pipe, 'anything', 1)", "never changes"),
    ("setattr(pipe, '_interrupt', True)", "StopIteration"),
    ("setattr(pipe, '_guidance_scale', 0.0)", "guidance_scale"),
    ("pipe.num_timesteps", "num_inference_steps"),
    ("pipe.enable_model_cpu_offload()", "fp16"),
    ("pipe.enable_sequential_cpu_offload()", "fp16"),
    ("pipe.enable_vae_tiling()", "smaller pictures"),
    ("pipe.enable_vae_slicing()", "fewer"),
    ("pipe.enable_attention_slicing()", "not needed"),
    ("pipe.enable_xformers_memory_efficient_attention()", "not needed"),
    ("pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)", "no FreeU"),
    ("pipe.components", "pipe.parts"),
    ("pipe.encode_prompt('sea', 'cpu', 1, True)", "pipe.text.encode"),
    ("pipe.vae_scale_factor", "downscale"),
    ("pipe.image_processor", "PIL images"),
    ("pipe.push_to_hub('me/model')", "pipe.save"),
    ("pipe('sea', image='https://example.com/boat.png')", "not fetched"),
    ("pipe('sea', image=['http://example.com/boat.png'])", "not fetched"),
    ("pipe('sea', image=[img, img2, img])", None),
    ("pipe(['sea', 'boat'], image=[img, img2, img])", "one for each"),
    ("pipe('sea', image=5)", "PIL image, array or tensor"),
    ("pipe('sea', image=[])", "no pictures"),
    ("pipe('sea', image=np.full((8, 8, 3), 300))", "0..255"),
    ("pipe('sea', image=np.full((8, 8, 3), 2.5))", "0..1"),
    ("pipe('sea', image=torch.zeros(1, 4, 8, 8), height=32, width=32)", "leave height and width out"),
    ("pipe('sea', image=torch.zeros(1, 4, 8, 8), mask_image=img)", "picture itself"),
    ("pipe('sea', seed=3.5)", "whole number"),
    ("pipe('sea', seed='3')", "whole number"),
    ("pipe('sea', seed=[1, 'a'])", "whole number"),
    ("pipe(5)", "a text, or a list of texts"),
    ("pipe(b'sea')", "a text, or a list of texts"),
    ("pipe([5])", "prompt 5"),
    ("pipe('sea', negative_prompt=5)", "a text, or a list of texts"),
    ("pipe('sea', generator=[1])", "torch.Generator"),
    ("pipe('sea', generator=7)", "torch.Generator"),
    ("pipe('sea', cross_attention_kwargs={'gligen': 1})", "only scale"),
    ("pipe('sea', ip_adapter_image=img)", "image with strength"),
    ("pipe('sea', ip_adapter_image_embeds=[embeds])", "image with strength"),
    ("pipe('sea', callback=print, callback_steps=1)", "callback_on_step_end"),
    ("pipe('sea', max_sequence_length=77)", "any length"),
    ("pipe('sea', negative_promt='red')", "did you mean negative_prompt"),
    ("pipe('sea', callback_on_step_end_tensor_inputs=['mask'])", "prompt_embeds"),
    ("pipe('sea', callback_on_step_end=lambda *_: {'noise': 1}, **few)", "prompt_embeds"),
    ("pipe('sea', callback_on_step_end=lambda p, *_: setattr(p, '_interrupt', True), **few)", "stop"),
    ("pipe('sea', callback_on_step_end=lambda *_: {'latents': 5}, **few)", "[1, 4, 8, 8]"),
    (
        "pipe('sea', callback_on_step_end=lambda *_: {'prompt_embeds': torch.zeros(2, 9, 24)}, **few)",
        "[2, 16, 24]",
    ),
    ("pipe('sea', spacing='DPMSolverMultistepScheduler')", "for a sampler use --sampler dpmpp_2m"),
    ("pipe('sea', spacing='euler_a')", "for a sampler use --sampler euler_a"),
    ("pipe.with_lora('nobody/nothing-here')", "hub"),
    ("pipe.with_embedding('nobody/nothing-here')", "hub"),
    ("pipe.with_lora('loras/missing.safetensors')", "no such file"),
    ("ldm.StableDiffusionPipeline", "ldm.load"),
    ("ldm.AutoPipelineForText2Image", "ldm.load"),
    ("ldm.EulerDiscreteScheduler", "sampler="),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", [line.strip() for line in WORKS.strip().splitlines()])
def test_works_as_typed(made, line):
    assert eval(line, dict(made)) is not ...


@pytest.mark.parametrize(("line", "named"), SAYS, ids=[line for line, _ in SAYS])
def test_the_error_names_what_to_write(made, line, named):
    if named is None:  # one prompt for several pictures
        assert len(eval(line.replace(")", ", **few)"), dict(made)).images) == 3
        return
    with pytest.raises((ldm.UserError, ImportError)) as caught:
        eval(line, dict(made))
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def test_the_loaders_are_one():
    assert ldm.Pipeline.from_pretrained is ldm.Pipeline.from_single_file is ldm.load
    for name, values in HARMLESS.items():
        assert values is None or name in INSTEAD, name


def test_every_name_of_diffusers_pipelines_works_or_says_what_to_write(made):
    """All that a pipeline of diffusers has, and we might be asked for."""
    pipe, silent = made["pipe"], []
    cls = diffusers.StableDiffusionPipeline
    names = [name for name in dir(cls) if not name.startswith("_")]
    for name in names:
        if name in INSTEAD or OWN_FILES.match(name):
            continue
        if not hasattr(pipe, name):
            silent.append(name)
    assert set(silent) <= LEFT_OUT, set(silent) - LEFT_OUT


# What concerns its own files and configs.
OWN_FILES = re.compile(
    "(load_config|from_config|from_flax|config_name|save_config|get_config|to_json|extract|register|download"
    "|dict_from|model_cpu|hf_|ignore_|has_compat|is_save|dtype$|name_or_path)"
)
# Inner workings, which no example of diffusers' documentation calls.
LEFT_OUT = {
    "get_guidance_scale_embedding",
    "parameters",
    "set_attention_slice",
    "get_timesteps",
    "guidance_scale",
    "guidance_rescale",
    "clip_skip",
    "cross_attention_kwargs",
    "prepare_extra_step_kwargs",
    "prepare_ip_adapter_image_embeds",
    "encode_image",
    "lora_scale",
    "num_fused_loras",
    "fused_loras",
    "set_lora_device",
    "lora_state_dict",
    "write_lora_layers",
    "pack_weights",
    "load_lora_into_text_encoder",
    "load_lora_metadata",
    "unet_name",
    "text_encoder_name",
    "transformer_name",
    "maybe_convert_prompt",
    "enable_lora_hotswap",
    "reset_device_map",
    "compile_repeated_blocks",
    "set_attention_backend",
}


# --- that it works means that it is right ----------------------------------------------------------------


def latents(pipe, prompt="the red boat", **arguments):
    return pipe(prompt, **{"num_inference_steps": 3, "output_type": "latent", **arguments}).images


def error(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def levels(image):
    return np.asarray(image)


ONE_PICTURE = {
    "8 bits": lambda image: levels(image),
    "whole numbers": lambda image: levels(image).astype(np.int64),
    "a batch of 8 bits": lambda image: levels(image)[None],
    "0..1": lambda image: levels(image) / 255,
    "a tensor": lambda image: torch.from_numpy(levels(image).copy()).permute(2, 0, 1) / 255,
    "a batch of tensors": lambda image: torch.from_numpy(levels(image).copy()).permute(2, 0, 1)[None] / 255,
    "a list": lambda image: [image],
    "a tuple of arrays": lambda image: (levels(image),),
}


@pytest.mark.parametrize("form", ONE_PICTURE.values(), ids=ONE_PICTURE)
def test_a_picture_in_any_form_is_the_same_picture(made, form):
    common = {"seed": 1, "strength": 0.7}
    drawn = latents(made["pipe"], image=form(picture()), **common)
    assert error(drawn, latents(made["pipe"], image=picture(), **common)) < 1e-5


@pytest.mark.parametrize("form", ["images", "arrays", "floats", "tensors"])
def test_each_prompt_has_its_own_picture(made, form, monkeypatch):
    pipe, images = made["pipe"], [picture(seed) for seed in (1, 2, 3)]
    batch = {
        "images": images,
        "arrays": np.stack([levels(image) for image in images]),
        "floats": np.stack([levels(image) for image in images]) / 255,
        "tensors": torch.stack([torch.from_numpy(levels(image) / 255).permute(2, 0, 1) for image in images]),
    }[form]
    prompts, common = ["sea", "the boat", "red"], {"strength": 0.7, "num_images_per_prompt": 2}
    alone = [
        latents(pipe, text, image=image, seed=[2 * k, 2 * k + 1], **common)
        for k, (text, image) in enumerate(zip(prompts, images, strict=True))
    ]
    together = latents(pipe, prompts, image=batch, seed=0, **common)
    assert error(together, torch.cat(alone)) < 1e-5
    monkeypatch.setattr("ldm.runtime.CPU_PIXELS", 4 * 16 * 16)  # batches that cut through a prompt's pictures
    assert error(latents(pipe, prompts, image=batch, seed=0, **common), together) < 1e-5
    assert error(together[:2], together[2:4]) > 1e-2


@pytest.mark.parametrize("family", ["inpaint", "pix2pix", "upscaler"])
def test_each_prompt_has_its_own_picture_and_mask_in_every_kind(families, family):
    pipe = ldm.load(families(family)[0], device="cpu", dtype="fp32")
    images = [picture(seed, 8 if family == "upscaler" else 16) for seed in (1, 2)]
    masks = []
    if family == "inpaint":
        masks = [np.zeros((16, 16), dtype=bool), np.zeros((16, 16), dtype=bool)]
        masks[0][4:], masks[1][:, :5] = True, True
    prompts, common = ["sea", "the boat"], {"num_inference_steps": 2, "output_type": "pt"}
    given = [{"image": image} | ({"mask_image": masks[k]} if masks else {}) for k, image in enumerate(images)]
    both = {"image": images} | ({"mask_image": np.stack(masks)} if masks else {})
    together = pipe(prompts, seed=[3, 4], **both, **common).images
    alone = [pipe(prompts[k], seed=3 + k, **given[k], **common).images for k in range(2)]
    assert error(together, torch.cat(alone)) < 1e-5


@pytest.mark.parametrize("rows", [1, 2])
def test_latents_as_the_picture_equal_diffusers(made, rows):
    theirs = diffusers.StableDiffusionImg2ImgPipeline(
        **made["theirs"].components, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    start = torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    prompts = ["the red boat", "sea"][:rows]
    common = {"image": start, "strength": 0.7, "num_inference_steps": 10, "output_type": "latent"}
    wanted = theirs(prompts, generator=[torch.Generator().manual_seed(k) for k in range(rows)], **common)
    assert error(made["pipe"](prompts, seed=0, **common).images, wanted.images) < 1e-4


def test_a_callback_sees_and_replaces_what_diffusers_callbacks_do(made):
    """Their own example: guidance is switched off on the way."""
    seen = {"ours": [], "theirs": []}

    def watch(name, pipe, i, kwargs):
        seen[name].append(kwargs["prompt_embeds"].clone())
        if i == 1:
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
            if name == "theirs":
                pipe._guidance_scale = 0.0
            else:
                kwargs["guidance_scale"] = 0.0
        elif i == 2:
            kwargs["latents"] *= 0.5  # in place
        return kwargs

    common = {"num_inference_steps": 5, "output_type": "latent"}
    common["callback_on_step_end_tensor_inputs"] = ["latents", "prompt_embeds"]

    def draw(name, pipe):
        def callback(pipe, i, t, kwargs):
            return watch(name, pipe, i, kwargs)

        generator = torch.Generator().manual_seed(1)
        return pipe("the red boat", generator=generator, callback_on_step_end=callback, **common).images

    ours, theirs = draw("ours", made["pipe"]), draw("theirs", made["theirs"])
    assert error(seen["ours"][0], seen["theirs"][0]) < 1e-5
    assert error(ours, theirs) < 1e-4
    assert error(ours, latents(made["pipe"], seed=1, num_inference_steps=5)) > 1e-2


@pytest.mark.parametrize("family", ["sd1", "pix2pix"])
@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
def test_embeddings_that_a_callback_replaces_hold_from_the_next_step_on(families, family, name):
    """Replaced after the first step of two, the second is that of the other prompt."""
    pipe = ldm.load(families(family)[0], device="cpu", dtype="fp32")
    common = {"sampler": "euler", "num_inference_steps": 2, "seed": [1, 2]}
    common |= {"image": picture()} if family == "pix2pix" else {}
    argument = name.replace("_embeds", "")
    texts = {"prompt": ["red", "the boat"], "negative_prompt": ["sea", "a"]}
    other = pipe.text.encode(["at", "boat"]).tokens
    steps = []

    def replaced(p, i, t, kwargs):
        steps.append(kwargs["latents"].clone())
        return {name: other} if i == 0 else {}

    drawn = latents(pipe, callback_on_step_end=replaced, **texts, **common)
    swapped = {**texts, argument: ["at", "boat"]}
    wanted = latents(
        pipe,
        callback_on_step_end=lambda p, i, t, kwargs: {"latents": steps[0]} if i == 0 else {},
        **swapped,
        **common,
    )
    assert error(drawn, wanted) < 1e-4
    assert error(drawn, latents(pipe, **texts, **common)) > 1e-3


@pytest.mark.parametrize("way", ["returned", "raised"])
def test_stopping_gives_what_diffusers_gives(made, way):
    def stop(pipe, i, t, kwargs):
        if i == 2 and way == "raised":
            raise StopIteration
        return {"stop": i == 2}

    def interrupt(pipe, i, t, kwargs):
        pipe._interrupt = i == 2
        return kwargs

    common = {"num_inference_steps": 6, "output_type": "latent"}
    ours = made["pipe"]("sea", seed=1, callback_on_step_end=stop, **common).images
    generator = torch.Generator().manual_seed(1)
    theirs = made["theirs"]("sea", generator=generator, callback_on_step_end=interrupt, **common).images
    assert error(ours, theirs) < 1e-4


def test_stopping_ends_the_whole_call(made, monkeypatch):
    monkeypatch.setattr("ldm.runtime.CPU_PIXELS", 2 * 16 * 16)
    result = made["pipe"](
        ["sea", "boat"],
        num_images_per_prompt=3,
        seed=5,
        num_inference_steps=3,
        callback_on_step_end=lambda p, i, t, kwargs, seen=[]: seen.append(i) or {"stop": len(seen) == 4},
    )
    assert len(result.images) == 4  # the second batch was stopped, the third not begun
    assert result.seeds == (5, 6, 7, 8)
    assert [request.seeds for request in result.requests] == [(5, 6, 7), (8,)]


def test_an_sdxl_callback_sees_pooled_text_and_sizes(families):
    folder, theirs = families("sdxl")
    pipe, names = ldm.load(folder, device="cpu", dtype="fp32"), ["add_text_embeds", "add_time_ids"]
    seen = {"ours": [], "theirs": []}
    for name, each in (("ours", pipe), ("theirs", theirs)):
        each(
            "sea",
            num_inference_steps=1,
            negative_prompt="boat",
            callback_on_step_end=lambda p, i, t, kwargs, name=name: seen[name].append(dict(kwargs)) or kwargs,
            callback_on_step_end_tensor_inputs=names,
            output_type="latent",
        )
    for name in names:
        assert error(seen["ours"][0][name].float(), seen["theirs"][0][name].float()) < 1e-5


def test_to_shares_what_is_there_and_changes_nothing(made):
    pipe = made["pipe"].with_lora(made["lora"], 0.5)
    same, half = pipe.to("cpu", torch.float32), pipe.to(torch.bfloat16)
    before = latents(pipe, seed=1)
    assert torch.equal(latents(same, seed=1), before)
    assert same.unet is not pipe.unet
    assert same.unet.conv_in.weight is pipe.unet.conv_in.weight
    assert [lora.name for lora in half.adapted.loras] == [lora.name for lora in pipe.adapted.loras]
    for part in (half.unet, half.vae, half.text_encoder):
        assert {p.dtype for p in part.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert next(pipe.unet.parameters()).dtype is torch.float32
    loaded = ldm.load(made["path"], device="cpu", dtype="bf16").with_lora(made["lora"], 0.5)
    assert torch.equal(latents(half, seed=1), latents(loaded, seed=1))
    assert torch.equal(latents(pipe, seed=1), before)
    # The rule of loading: a VAE that overflows in fp16 is not run in it.
    loaded = ldm.load(made["path"], device="cpu", dtype="fp16")
    for part in ("unet", "vae", "text_encoder"):
        dtypes = [next(getattr(each, part).parameters()).dtype for each in (loaded, pipe.to(torch.float16))]
        assert dtypes[0] is dtypes[1]


def test_to_takes_fused_adapters_and_words_along(made, tmp_path):
    word = tmp_path / "word.bin"
    torch.save({"<cat>": torch.randn(2, 24)}, word)
    pipe = made["pipe"].with_embedding(word).with_lora(made["lora"], 0.5).fuse()
    half = pipe.to(dtype=torch.bfloat16)
    assert half.adapted.fused
    back = half.to("cpu", torch.float32)
    assert error(latents(back, "the <cat> boat", seed=1), latents(pipe, "the <cat> boat", seed=1)) < 0.1
    assert [each.name for each in back.adapted.embeddings] == ["<cat>"]


def test_compiled_draws_the_same_and_leaves_the_old_one_alone(made):
    pipe, graphs = made["pipe"], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = pipe.compiled(backend=backend)
    assert error(latents(compiled, seed=1), latents(pipe, seed=1)) < 1e-5
    made_by_compiled = len(graphs)
    assert made_by_compiled > 0
    assert compiled.unet.conv_in.weight is pipe.unet.conv_in.weight
    latents(compiled.with_lora(made["lora"]), seed=1)
    latents(pipe, seed=1)
    assert len(graphs) == made_by_compiled


def test_the_scale_of_loras_is_their_weight(made):
    pipe = made["pipe"].with_lora(made["lora"], 0.8)
    result = pipe("sea", seed=1, cross_attention_kwargs={"scale": 0.25}, **made["few"])
    assert torch.equal(
        result.images, made["pipe"].with_lora(made["lora"], 0.2)("sea", seed=1, **made["few"]).images
    )
    assert result.request.loras[0].weight == pytest.approx(0.2)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_folder_without_text_encoder_draws_from_embeddings(families, tmp_path, family):
    whole = ldm.load(families(family)[0], device="cpu", dtype="fp32")
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    ldm.Pipeline.from_parts(dataclasses.replace(whole.parts, **nothing)).save(tmp_path / "bare")
    bare = ldm.load(tmp_path / "bare", device="cpu", dtype="fp32")
    texts = whole.text.encode(["the red boat", "sea"])
    given = {"prompt_embeds": texts.tokens[:1], "negative_prompt_embeds": texts.tokens[1:]}
    if family == "sdxl":
        given |= {"pooled_prompt_embeds": texts.pooled[:1], "negative_pooled_prompt_embeds": texts.pooled[1:]}
    wanted = latents(whole, negative_prompt="sea", seed=1)
    assert error(latents(bare, None, seed=1, **given), wanted) < 1e-5
    positive = {name: value for name, value in given.items() if "negative" not in name}
    assert error(
        latents(bare, None, seed=1, guidance_scale=1, **positive), latents(whole, seed=1, guidance_scale=1)
    ) < 1e-5  # fmt: skip
    for arguments in ({"prompt": "sea"}, {"prompt": ["sea", "boat"]}):
        with pytest.raises(ldm.UserError, match="no text encoder: give prompt_embeds"):
            latents(bare, **arguments)


# --- the arguments are declared once ---------------------------------------------------------------------

NO_ARGUMENT = {
    "image_sha256": "noted by the pipeline",
    "mask_image_sha256": "noted by the pipeline",
    "loras": "with_lora, --lora",
    "embeddings": "with_embedding, --embedding",
    "model": "noted by the pipeline; --model finds it",
    "model_hash": "noted by the pipeline",
    "not_kept": "noted by the pipeline",
    "upscaling": "with_upscaler, --upscaler",
    "version": "of the rules",
}
NO_FIELD = {
    "num_images_per_prompt", "generator", "latents", "output_type", "callback_on_step_end",
    "callback_on_step_end_tensor_inputs", "guidance", "cross_attention_kwargs", "return_dict", "others",
    "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
}  # fmt: skip
NO_FLAG = {"timesteps", "sigmas"}  # grids are for those who program
RENAMED = {"seeds": "seed"}


def test_each_argument_is_in_the_call_the_request_the_flags_and_the_json():
    import inspect

    call = inspect.signature(ldm.Pipeline.__call__).parameters
    parser = Parser("txt2img")
    add_flags(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    defaults = {flag: action.default for action in parser._actions for flag in action.option_strings}
    for name, field in Request.model_fields.items():
        argument = RENAMED.get(name, name)
        assert (argument in call) != (name in NO_ARGUMENT), name
        if name in NO_ARGUMENT:
            continue
        if name not in ("seeds", "prompt"):  # random in Python, 42 on the command line, 0 in a request
            assert call[argument].default == field.default, name
        flag = FLAGS.get(name, f"--{name.replace('_', '-')}")
        assert (flag in flags) != (name in NO_FLAG), name
        if flag in flags and name not in ("seeds", "prompt"):
            assert defaults[flag] == field.default, name
    renamed = {RENAMED.get(name, name) for name in Request.model_fields}
    assert call.keys() - renamed - {"self"} == NO_FIELD
    assert {each.name for each in dataclasses.fields(Inputs)} - call.keys() == {
        "generators", "solver", "image_latents"
    }  # fmt: skip


def test_every_field_of_a_request_survives_the_json():
    special = {
        "sampler": "euler", "spacing": "karras", "loras": [{"name": "a", "weight": 0.5}], "sigmas": None,
        "embeddings": [{"name": "<cat>", "sha256": "0" * 64}], "upscaling": Request(noise_level=3),
        "timesteps": (9.0, 1.0), "seeds": (4, 2), "version": 1, "not_kept": ("latents",),
    }  # fmt: skip
    values = {}
    for name, field in Request.model_fields.items():
        kinds = str(field.annotation)
        if name in special:
            value = special[name]
        elif "sha256" in name:
            value = "1" * 64
        elif "tuple" in kinds:
            value = (16, 8)
        elif "str" in kinds:
            value = "words"
        else:
            value = 0.5 if "float" in kinds else 16
        if value is not None:
            values[name] = value
    request = Request(**values)
    assert Request.from_json(request.to_json()) == request
    left_open = {name for name in Request.model_fields if getattr(request, name) is None}
    assert left_open == {"sigmas"}
    assert isinstance(request.seeds, Sequence)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--scheduler", "DPMSolverMultistepScheduler"], "for a sampler use --sampler dpmpp_2m"),
        (["--init-image", "https://example.com/a.png"], "addresses are not fetched"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_command_line_says_so_too(made, flags, named, capsys, tmp_path):
    common = ["-m", made["path"], "--device", "cpu", "-p", "sea", "--outdir", str(tmp_path / "out")]
    assert cli.txt2img([*common, *flags]) == 2
    assert named in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))
