"""Device, dtype, batch size."""

import pytest
import torch

from ldm.errors import UserError
from ldm.runtime import Runtime, choose, finite, peak_memory, set_threads

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("amx", "bf16", "dtype"),
    [(False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)],
)
def test_bf16_is_the_default_of_processors_that_have_it(monkeypatch, amx, bf16, dtype):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: bf16)
    assert choose("cpu") == Runtime(CPU, dtype)
    assert choose("cpu", "fp16") == Runtime(CPU, torch.float16)
    assert choose(CPU, torch.float32) == Runtime(CPU, torch.float32)


@pytest.mark.parametrize(
    ("dtype", "name"), [("Half", "float16"), ("bfloat16", "bfloat16"), ("full", "float32")]
)
def test_spellings_of_dtypes(dtype, name):
    assert str(choose("cpu", dtype).dtype) == f"torch.{name}"


def test_images_at_once():
    runtime = Runtime(CPU, torch.float32)
    assert [runtime.images_at_once(side, side) for side in (128, 256, 512, 2048)] == [32, 8, 2, 1]


def test_vae_that_overflows_is_not_run_in_fp16():
    half = Runtime(CPU, torch.float16)
    assert (half.vae_dtype(True), half.vae_dtype(False)) == (torch.float32, torch.float16)
    assert Runtime(CPU, torch.bfloat16).vae_dtype(True) is torch.bfloat16


def test_peak_memory_grows_with_what_is_used():
    before = peak_memory(CPU)
    assert 2**20 < before < 2**40
    block = torch.ones(before // 4 + 2**26)  # four bytes each
    assert peak_memory(CPU) >= before + 2**26
    assert block[0] == 1


def test_threads():
    before = torch.get_num_threads()
    set_threads(1)
    assert torch.get_num_threads() == 1
    set_threads(before)
    with pytest.raises(UserError, match="threads = 0"):
        set_threads(0)


def test_finite_passes_good_output_through_and_leaves_the_module_alone():
    layer = torch.nn.Linear(4, 4).bfloat16()
    x = torch.randn(2, 4)
    (out,) = finite(layer, lambda module: (module(x.to(module.weight.dtype)),), "the layer")
    assert out.dtype is torch.float32
    assert torch.equal(out, layer(x.bfloat16()).float())
    with pytest.warns(UserWarning, match="the layer gave NaN or Inf in bfloat16"):
        (out,) = finite(
            layer, lambda m: (m(x.to(m.weight.dtype)) / (m.weight.dtype != torch.bfloat16),), "the layer"
        )
    assert out.isfinite().all()
    assert layer.weight.dtype is torch.bfloat16
    with pytest.raises(FloatingPointError, match="the layer gives NaN or Inf, in float32 too"):
        finite(layer.float(), lambda module: (module(x) / 0,), "the layer")
