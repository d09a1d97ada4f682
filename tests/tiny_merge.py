"""Models to merge: copies of a tiny pipeline folder whose every tensor is another, and what is in them."""

import shutil

import torch
from safetensors.torch import load_file, save_file


def varied(folder, target, seed, dtype=None):
    """A copy of a pipeline folder with noise upon all weights; in `dtype`."""
    shutil.copytree(folder, target)
    generator = torch.Generator().manual_seed(seed)
    for path in sorted(target.glob("*/*.safetensors")):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            noisy = tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
            tensors[name] = noisy.to(dtype or tensor.dtype)
        save_file(tensors, path, metadata={"format": "pt"})
    return target


def state(folder):
    """All tensors of a pipeline folder, as unet.conv_in.weight; without `text_model.`, which some omit."""
    return {
        f"{path.parent.name}.{name.removeprefix('text_model.')}": tensor
        for path in sorted(folder.glob("*/*.safetensors"))
        for name, tensor in load_file(path).items()
    }
