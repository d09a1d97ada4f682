"""Models in floats of one byte, for which torch has hardly a function: read as their copies in fp32 are."""

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_families import make_family

import ldm
from ldm.checkpoint.convert import convert
from ldm.checkpoint.fill import is_finite

DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder and a single file in fp32."""
    root = tmp_path_factory.mktemp("float8")
    make_family("sd1", root / "model")
    ldm.load(root / "model", device="cpu", dtype="fp32").save(root / "model.safetensors")
    return root


def recast(path, dtype):
    """The tensors of a model, or of all files of a folder, rounded to `dtype` and given to `path` again."""
    for file in path.rglob("*.safetensors") if path.is_dir() else [path]:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in load_file(file).items()
        }
        save_file(tensors, file, metadata=metadata)


def copied(source, target):
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    return target


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["model", "model.safetensors"])
def test_read_as_its_copy_in_fp32(made, tmp_path, name, dtype):
    small, wide = copied(made / name, tmp_path / name), copied(made / name, tmp_path / f"wide-{name}")
    recast(small, dtype)
    recast(wide, dtype)
    recast(wide, torch.float32)
    ours, theirs = (ldm.load(path, device="cpu", dtype="fp32") for path in (small, wide))
    for part in ("unet", "vae", "text_encoder"):
        one, two = (getattr(pipe.parts, part).state_dict() for pipe in (ours, theirs))
        assert all(torch.equal(one[key], two[key]) for key in two)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["model", "model.safetensors"])
def test_nan_is_found(made, tmp_path, name, dtype):
    path = copied(made / name, tmp_path / name)
    recast(path, dtype)
    file = path / "unet" / "diffusion_pytorch_model.safetensors" if path.is_dir() else path
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    damaged = next(key for key in tensors if key.endswith(("conv_in.weight", "input_blocks.0.0.weight")))
    tensors[damaged] = torch.full(tensors[damaged].shape, float("nan")).to(dtype)
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ldm.UserError, match=r"conv_in\.weight holds NaN or Inf"):
        ldm.load(path, device="cpu", dtype="fp32")
    with pytest.raises(ldm.UserError, match=r"conv_in\.weight holds NaN or Inf"):
        convert(path, tmp_path / "converted")  # keeps the dtype
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64, torch.int64])
def test_is_finite(dtype):
    numbers = torch.tensor([0.0, 1.5, -2.0]).to(dtype)
    assert is_finite(numbers)
    if dtype.is_floating_point:
        assert not is_finite(torch.tensor([1.0, float("nan")]).to(dtype))
