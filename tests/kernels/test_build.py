"""Compiling the kernels: kept once made, done without where that fails."""

import warnings

import pytest
import torch
from torch import nn

from ldm.kernels import build, native
from ldm.kernels.convolution import Conv2d


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A cache folder with nothing in it, and nothing loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(build.SWITCH, raising=False)
    build.library.cache_clear()
    yield tmp_path / "ldm" / "kernels"
    build.library.cache_clear()


@pytest.mark.skipif(not native.available(), reason="no compiler here")
def test_is_made_once_and_kept(fresh, monkeypatch):
    assert build.library() is not None
    (made,) = fresh.iterdir()  # and nothing else is left
    build.library.cache_clear()
    monkeypatch.setattr(build, "compile_to", lambda path: pytest.fail("made again"))
    assert build.library() is not None
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    assert made.name != f"kernels-{build._digest()}.so"


@pytest.mark.parametrize(
    ("compiler", "told"),
    [("/no/such/compiler", "No such file or directory: '/no/such/compiler'"), ("false", "exit status 1")],
)
def test_without_a_compiler_torch_draws_and_it_is_said_once(fresh, monkeypatch, compiler, told):
    monkeypatch.setenv("CXX", compiler)
    layer, x = Conv2d(128, 128, 3, padding=1).requires_grad_(False), torch.randn(1, 128, 32, 32)
    with pytest.warns(UserWarning, match="no kernels for this CPU") as seen:
        out = layer(x)
    assert told in str(seen[0].message)
    assert torch.equal(out, nn.Conv2d.forward(layer, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)


def test_a_place_that_cannot_be_written_to_is_said(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"no kernels .* Not a directory"):
        assert not native.available()


def test_can_be_switched_off(fresh, monkeypatch):
    monkeypatch.setenv(build.SWITCH, "off")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not native.available()
    assert not fresh.exists()
