"""The arguments of a drawing are declared once: the call, the request, the flags and the JSON agree."""

import dataclasses
from collections.abc import Sequence

import ldm
from ldm.cli.drawing.draw_flags import add_flags
from ldm.cli.flags import FLAGS
from ldm.cli.parser import Parser
from ldm.pipeline import Inputs
from ldm.pipeline.pipeline import FIELDS
from ldm.request import NOTED, Request

NO_FIELD = {
    "num_images_per_prompt", "generator", "latents", "output_type", "callback_on_step_end",
    "callback_on_step_end_tensor_inputs", "cross_attention_kwargs", "return_dict", "others",
    "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
    "ip_adapter_image", "ip_adapter_image_embeds",
}  # fmt: skip
# Grids and latents are for those who program; of the second pass some fields have flags of their own.
NO_FLAG = {"timesteps", "sigmas", "denoising_start", "denoising_end", "hires"}
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
        if name in NOTED:
            assert argument not in call, name
            continue
        if argument in call and name not in ("seeds", "prompt"):  # random in Python, 42 on the command line
            assert call[argument].default == field.default, name
        assert argument in call or argument in FIELDS, name
        flag = FLAGS.get(name, f"--{name.replace('_', '-')}")
        assert (flag in flags) != (name in NO_FLAG), name
        if flag in flags and name not in ("seeds", "prompt"):
            assert defaults[flag] == field.default, name
    renamed = {RENAMED.get(name, name) for name in Request.model_fields}
    assert call.keys() - renamed - {"self"} == NO_FIELD
    assert not call.keys() & {*NOTED, *FIELDS}
    assert {each.name for each in dataclasses.fields(Inputs)} - call.keys() == {
        "generators", "solver", "image_latents", "control_images", "ip_adapter_masks"
    }  # fmt: skip


def test_every_field_of_a_request_survives_the_json():
    special = {
        "sampler": "euler", "spacing": "karras", "loras": [{"name": "a", "weight": 0.5}], "sigmas": None,
        "embeddings": [{"name": "<cat>", "sha256": "0" * 64}], "upscaling": Request(noise_level=3),
        "hires": Request(strength=0.5, height=64, width=32), "refining": Request(guidance_scale=2.0),
        "hires_scale": 1.5, "tiling": "x", "guidance": "apg:eta=0",
        "timesteps": (9.0, 1.0), "seeds": (4, 2), "version": 1, "not_kept": ("latents",),
        "prompt_grammar": "comfy", "noise": "gpu", "mask_fill": "blur", "extend": (0, 8, 0, 8),
        "mask_invert": True, "soft_mask": True, "variation_strength": 0.5, "variation_seed": 3,
        "control": [{"model": "net", "image": "edges.png", "scale": 0.5, "mode": "prompt"}],
        "sampler_options": {"s_churn": 2}, "guidance_interval": (0.2, 0.8), "fast": True, "watermark": "ldm",
        "image_prompts": [{"adapter": "a.bin", "images": ["b.png"], "scale": {"up": {"block_0": [0, 1]}}}],
        "nsfw_content_detected": True, "resize_mode": "fill",
        "regions": ({"box": (0, 0, 8, 8), "prompt": "sea"},), "freeu": (1.3, 1.4, 0.9, 0.2),
        "word_weights": {"sea": 2}, "drawn_as": {"ark": "boat"}, "transparent": True,
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
