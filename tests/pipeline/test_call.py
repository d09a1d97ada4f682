"""What a call of the pipeline takes: that it works means that it is right."""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from family_inputs import error, latents, picture

import ldm


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
    pipe, images = made["pipe"], [picture(seed=seed) for seed in (1, 2, 3)]
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


@pytest.mark.parametrize("family", ["inpaint", "sd1", "pix2pix", "upscaler"])
def test_each_prompt_has_its_own_picture_and_mask_in_every_kind(families, family):
    pipe = ldm.load(families(family)[0], device="cpu", dtype="fp32")
    side = 8 if family == "upscaler" else 16
    images = [picture(side, side, seed) for seed in (1, 2)]
    masks = []
    if family in ("inpaint", "sd1"):
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
