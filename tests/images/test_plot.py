"""Axes of plots, and what they change in a request."""

import pytest

from ldm.errors import UserError
from ldm.images.plot import read_plot
from ldm.request import Request


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("steps=4,8,20", [("num_inference_steps", (4, 8, 20))]),
        ("scale=1,4; cfg-rescale=1", None),
        ("CFG Scale=1,4.5; Sampler=euler, DPM++ 2M Karras", [
            ("guidance_scale", (1.0, 4.5)), ("sampler", ("euler", "DPM++ 2M Karras")),
        ]),
        ("seed=1-4", [("seeds", (1, 2, 3, 4))]),
        ("seed=1-10(+3)", [("seeds", (1, 4, 7, 10))]),
        ("steps=9-1(-3)", [("num_inference_steps", (9, 6, 3))]),
        ("steps=3-1", [("num_inference_steps", (3, 2, 1))]),
        ("steps=1-10[4]", [("num_inference_steps", (1, 4, 7, 10))]),
        ("strength=0.2-1(+0.2)", [("strength", (0.2, 0.4, 0.6, 0.8, 1.0))]),
        ("denoising=0-1[3], 0.7", [("strength", (0.0, 0.5, 1.0, 0.7))]),
        ("cfg=-1-1", [("guidance_scale", (-1.0, 0.0, 1.0))]),
        ('prompt s/r="red; big, boat", sea ,', [(None, ("red; big, boat", "sea"))]),
        ("W=64,128;H=64;clip_skip=0,1", [("width", (64, 128)), ("height", (64,)), ("clip_skip", (0, 1))]),
    ],
)  # fmt: skip
def test_axes(text, axes):
    if axes is None:
        with pytest.raises(UserError):
            read_plot([text])
        return
    assert [(axis.field, axis.values) for axis in read_plot([text]).axes] == axes
    assert read_plot(text.split(";") if '"' not in text else [text]) == read_plot([text])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has 0 axes"),
        ("steps", "has no values"),
        ("steps=", "has no values"),
        ("stps=1", "did you mean steps"),
        ("timesteps=1", "unknown axis"),
        ("model_hash=1", "unknown axis"),
        ("steps=1.5", "write whole numbers"),
        ("steps=1-2(+0.5)", "write whole numbers"),
        ("cfg=high", "write numbers"),
        ("cfg=1-2(0)", "write numbers"),
        ("cfg=1-2(-1)", "write numbers"),
        ("seed=1-99999999999", "write whole numbers"),
        ("steps=1; num_inference_steps=2", "two axes of num_inference_steps"),
        ("steps=1;cfg=1;seed=1;eta=0", "has 4 axes"),
        ("steps=1-100; cfg=1-100", "10000 cells: a sheet holds at most 2500"),
    ],
)
def test_axes_that_are_none(text, message):
    with pytest.raises(UserError, match=message):
        read_plot([text])


def test_words_are_replaced_before_tags_are_read():
    plot = read_plot(["s/r=<lora:a:0.5>, <lora:b:1>, blue"])
    fields = {"prompt": "a boat <lora:a:0.5>", "negative_prompt": None}
    requests = [Request(**changed) for _, changed in plot.cells(fields)]
    assert [request.prompt for request in requests] == ["a boat", "a boat", "a boat blue"]
    assert [use and (use[0].name, use[0].weight) for use in (r.loras for r in requests)] == [
        ("a", 0.5), ("b", 1.0), None,
    ]  # fmt: skip
