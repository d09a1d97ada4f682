"""How adapters are written in prompts and on the command line."""

from pathlib import Path

import pytest

import ldm
from ldm.images.parameters import format_parameters, parse_parameters
from ldm.prompts.tags import parse_embedding, parse_lora, take_tags, write_tag
from ldm.request import LoraUse, Request


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("x.safetensors", ("x.safetensors", 1.0, None)),
        ("x.safetensors:0.8", ("x.safetensors", 0.8, None)),
        ("x.safetensors:0.5:0.8", ("x.safetensors", 0.8, 0.5)),
        ("x:-1", ("x", -1.0, None)),
        ("x:0", ("x", 0.0, None)),
        ("x:0:.5", ("x", 0.5, 0.0)),
        (r"C:\a\x.safetensors", (r"C:\a\x.safetensors", 1.0, None)),
        (r"C:\a\x.safetensors:0.8", (r"C:\a\x.safetensors", 0.8, None)),
        ("C:/x.safetensors:1:0.8", ("C:/x.safetensors", 0.8, 1.0)),
        ("a:b.safetensors:2", ("a:b.safetensors", 2.0, None)),
        ("x.safetensors:strong", ("x.safetensors:strong", 1.0, None)),  # no such file, it will turn out
    ],
)
def test_lora_flag(spec, expected):
    path, weight, text_weight = parse_lora(spec)
    assert (str(path), weight, text_weight) == (str(Path(expected[0])), *expected[1:])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("cat.pt", (None, "cat.pt")),
        ("<cat>=a/cat.pt", ("<cat>", "a/cat.pt")),
        ("a/b=c.pt", (None, "a/b=c.pt")),
        (r"C:\b=c.pt", (None, r"C:\b=c.pt")),
        ("=c.pt", (None, "=c.pt")),
    ],
)
def test_embedding_flag(spec, expected):
    name, path = parse_embedding(spec)
    assert (name, str(path)) == (expected[0], str(Path(expected[1])))


def test_tags_leave_the_prompt():
    prompt, uses = take_tags("a cat <lora:style:0.8>, sky <LORA:my file-v1.2: 2 :-0.5>")
    assert prompt == "a cat , sky"
    assert uses == [
        {"name": "style", "weight": 0.8},
        {"name": "my file-v1.2", "weight": -0.5, "text_weight": 2.0},
    ]
    assert take_tags("<lora:x>") == ("", [{"name": "x"}])
    assert take_tags("a <lyco:x:0.8> b <LyCo:y>") == ("a  b", [{"name": "x", "weight": 0.8}, {"name": "y"}])


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        " a  b ",
        "a < b > c",
        "<cat> (a:1.2)",
        "lora:x:1",
        "<lora>",
        "a <lora-cat> <hypernet2>",
        "<3 lora: x",
    ],
)
def test_other_prompts_stay_as_they_are(prompt):
    assert take_tags(prompt) == (prompt, [])


@pytest.mark.parametrize("tag", ["<lora:>", "<lora::1>", "<lora:x:much>", "<lora:x:1:2:3>", "<lora:x:nan>"])
def test_bad_tags(tag):
    with pytest.raises(ldm.UserError, match="is not a LoRA tag: write <lora"):
        Request(prompt=f"a {tag}")


@pytest.mark.parametrize(
    "written",
    [
        "<lora:x:0.8",
        "<lora:x:0.8)",
        "<lora x:0.8>",
        "< lora:x:0.8>",
        "<LoRA :x:0.8>",
        "<lora=x:0.8>",
        "<lyco x>",
        "<lora:x",
        "<locon:x:1>",
    ],
)
def test_tags_that_are_not_whole(written):
    """Read as words they would do nothing, without a word."""
    for prompt in (f"a boat {written}", f"{written}\na boat"):
        with pytest.raises(ldm.UserError) as caught:
            take_tags(prompt)
        assert str(caught.value).startswith(
            f"{written} in the prompt is not a LoRA tag: write <lora:name:0.8>"
        )
    with pytest.raises(ldm.UserError, match="is not a LoRA tag"):
        take_tags(f"a <lora:y:1> {written} boat")
    with pytest.raises(ldm.UserError, match="is not a LoRA tag"):
        Request(negative_prompt=written)


def test_hypernetworks_are_called_so():
    with pytest.raises(ldm.UserError, match="<hypernet:x:1> in the prompt is a hypernetwork"):
        Request(prompt="a boat <hypernet:x:1>, sea")
    with pytest.raises(ldm.UserError) as caught:
        take_tags(f"<hypernet:{'x' * 500}")
    assert len(str(caught.value)) < 110


def test_requests():
    request = Request(prompt="a <lora:x:0.8>", loras=[{"name": "y"}])
    assert request.prompt == "a"
    assert request.loras == (LoraUse(name="y"), LoraUse(name="x", weight=0.8))
    assert request.replace(width=64).loras == request.loras
    assert Request.from_json(request.to_json()) == request
    assert "loras" not in Request(prompt="a").to_json()
    assert Request(loras=[]) == Request()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"negative_prompt": "<lora:x:1>"}, "negative_prompt has a <lora:...> tag"),
        ({"prompt_2": "<lora:x:1>"}, "prompt_2 has a <lora:...> tag"),
        ({"prompt": "<lora:x:1> <lora:x:2>"}, "the LoRA x is given twice"),
        ({"prompt": "<lora:x:1>", "loras": [{"name": "x"}]}, "the LoRA x is given twice"),
        ({"loras": [{"name": "x", "weight": float("inf")}]}, "weight inf is not allowed"),
        ({"loras": [{"name": "x", "sha256": "ab"}]}, "sha256 'ab' is not allowed"),
        ({"loras": 3}, "loras 3 is not allowed: it must be a list of adapters"),
        ({"embeddings": [{"name": "x"}]}, "sha256"),
    ],
)
def test_bad_requests(fields, message):
    with pytest.raises(ldm.UserError) as caught:
        Request(**fields)
    assert message in str(caught.value)


def test_the_parameters_text_keeps_tags():
    """Other tools read them there; so do we."""
    request = Request(prompt="a cat <lora:x:0.8> <lora:y:0.5:1>", num_inference_steps=3)
    text = format_parameters(request)
    assert text.startswith("a cat <lora:x:0.8> <lora:y:0.5:1>\n")
    assert parse_parameters(text).loras == request.loras
    assert write_tag("x", 0.8, 0.8) == "<lora:x:0.8>"
