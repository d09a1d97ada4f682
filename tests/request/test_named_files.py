"""What a stranger's picture names is looked for on this computer alone."""

from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.request import Request
from ldm.request.named_files import check_here, files_named, passes_of

REMOTE = ("//host/share/net.safetensors", "\\\\host\\share\\net")
WORD = "which is not here, and nothing is fetched for a picture's word"


def naming(network, picture):
    """A request for each field that names files, of a network and a picture."""
    return {
        "control": Request(control=[{"model": network, "image": picture, "mask": picture}]),
        "image_prompts": Request(
            image_prompts=[
                {"adapter": network, "image_encoder": network, "images": [picture], "masks": [picture]}
            ]
        ),
        "regions": Request(regions=[{"mask": picture, "prompt": "sea"}]),
        "guidance": Request(guidance=f'autoguidance:model="{network}"'),
    }


@pytest.mark.parametrize("field", ["control", "image_prompts", "guidance"])
@pytest.mark.parametrize("name", ["owner/model", "https://host/net.safetensors", *REMOTE])
def test_a_network_is_not_fetched_for_a_pictures_word(tmp_path, field, name):
    request = naming(name, str(tmp_path))[field]
    for each in (request, Request(hires=request)):
        with pytest.raises(UserError, match=WORD):
            check_here(each, Path("stranger.png"))
    check_here(request, Path("stranger.png"), given=(field,))


@pytest.mark.parametrize("field", ["control", "image_prompts", "regions"])
@pytest.mark.parametrize("name", REMOTE)
def test_a_picture_on_another_computer_is_not_opened(tmp_path, field, name):
    with pytest.raises(UserError, match=WORD):
        check_here(naming(str(tmp_path), name)[field], Path("stranger.png"))


def test_what_lies_here_may_be_read(tmp_path):
    requests = naming(str(tmp_path), str(tmp_path / "gone.png"))
    for request in requests.values():
        check_here(request, Path("own.png"))
    assert {each.field for request in requests.values() for each in files_named(request)} == requests.keys()
    assert not list(files_named(Request(guidance="autoguidance+apg", image="a.png")))


def test_each_pass_is_one():
    inner = Request(strength=0.5)
    assert passes_of(Request(hires=inner, upscaling=inner)) == (
        Request(hires=inner, upscaling=inner),
        inner,
        inner,
    )
