"""Networks of full size with random weights, each against diffusers or transformers on the same tensors.

python tests/full_size.py sd1 sd2 upscaler sdxl refiner    prints the relative error of each of their networks

Both sides share one set of weights, so SDXL's U-Net takes 10 GiB and little more.
"""

import argparse
import time
from pathlib import Path

import diffusers
import torch
import transformers
from conftest import relative_error
from hub_configs import TEXT_ENCODERS, UNETS, VAES

from ldm.checkpoint.clip import make_text_encoder
from ldm.models import build

FAMILIES = {  # names of a U-Net, a VAE and text encoders in hub_configs
    "sd1": ("sd1", "sd1", ("clip_l",)),
    "sd2": ("sd2_768", "sd2", ("open_clip_h",)),
    "upscaler": ("upscaler", "upscaler", ("open_clip_h",)),
    "sdxl": ("sdxl", "sdxl", ("clip_l", "open_clip_g")),
    "refiner": ("refiner", "sdxl", ("open_clip_g",)),
}


def random_tensors(module):
    """Random weights, biases and norms for all of a module's names; activations keep about unit size.

    Drawing billions of normals would take minutes: tensors repeat one million of them.
    """
    pool = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    tensors = {}
    for name, p in module.state_dict().items():
        noise = pool.repeat(p.numel() // len(pool) + 1)[: p.numel()].view(p.shape)
        norm = "norm" in name and name.endswith("weight")
        tensors[name] = noise.div_(p[0].numel() ** 0.5) if p.ndim > 1 else noise.mul_(0.2).add_(norm)
    return tensors


def pair(config):
    """Diffusers' model and ours of one config.json, with the very same random tensors."""
    with torch.device("meta"):
        theirs, ours = getattr(diffusers, config["_class_name"]).from_config(config), build(config)
    tensors = random_tensors(theirs)
    for model in (theirs, ours):
        model.load_state_dict(tensors, assign=True)
        model.eval()
    return theirs, ours


def unet_inputs(config, batch, height, width):
    """Random inputs: what both sides take alike, then our keywords and diffusers' for the rest."""
    x = torch.randn(batch, config["in_channels"], height, width)
    context = torch.randn(batch, 77, config["cross_attention_dim"])
    ours, theirs = {}, {}
    if config.get("addition_embed_type") == "text_time":
        sizes = 5 if len(config["block_out_channels"]) == 4 else 6  # four levels has the refiner only
        width = config["projection_class_embeddings_input_dim"] - sizes * config["addition_time_embed_dim"]
        ours = {"pooled": torch.randn(batch, width), "time_ids": torch.rand(batch, sizes) * 1000}
        theirs["added_cond_kwargs"] = {"text_embeds": ours["pooled"], "time_ids": ours["time_ids"]}
    if config.get("num_class_embeds"):
        ours["class_labels"] = theirs["class_labels"] = torch.randint(config["num_class_embeds"], (batch,))
    if config.get("time_cond_proj_dim"):
        cond = torch.randn(batch, config["time_cond_proj_dim"])
        ours["timestep_cond"] = theirs["timestep_cond"] = cond
    return (x, torch.linspace(981, 3, batch), context), ours, theirs


@torch.no_grad()
def unet_errors(config, size=16):
    """The relative error of one call."""
    reference, unet = pair(config)
    both, ours, theirs = unet_inputs(config, 1, size, size)
    return {"out": relative_error(unet(*both, **ours), reference(*both, **theirs).sample)}


@torch.no_grad()
def vae_errors(reference, vae, size=(64, 64)):
    """The relative errors of encoding and of decoding."""
    images = torch.rand(1, 3, *size) * 2 - 1
    encoded = reference.encode(images)
    if hasattr(encoded, "latents"):
        pairs = {"encoded": (vae.encode(images).mean, encoded.latents)}
    else:
        moments, theirs = vae.encode(images), encoded.latent_dist
        pairs = {"mean": (moments.mean, theirs.mean), "logvar": (moments.logvar, theirs.logvar)}
    latents = torch.randn(vae.encode_latents(images).shape)
    z = latents / reference.config.scaling_factor
    pairs["decoded"] = (vae.decode_latents(latents), reference.decode(z).sample)
    return {name: relative_error(*each) for name, each in pairs.items()}


@torch.no_grad()
def text_errors(config):
    """The relative errors of the last two layers and, with a projection, of the pooled text."""
    (name,) = config["architectures"]
    with torch.device("meta"):
        reference = getattr(transformers, name)(transformers.CLIPTextConfig(**config))
    tensors = random_tensors(reference)
    reference.load_state_dict(tensors, assign=True)
    for module in reference.modules():
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(config["max_position_embeddings"])[None]
    ours = make_text_encoder(config, tensors, Path(name))
    ids = torch.randint(config["vocab_size"], (1, config["max_position_embeddings"]))
    theirs, mine = reference.eval()(ids, output_hidden_states=True), ours.eval()(ids)
    errors = {"last": relative_error(mine.last_hidden_state, theirs.last_hidden_state)}
    errors["penultimate"] = relative_error(mine.hidden_states[-2], theirs.hidden_states[-2])
    if "text_embeds" in theirs:
        errors["pooled"] = relative_error(mine.text_embeds, theirs.text_embeds)
    return errors


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="+", choices=FAMILIES)
    for family in parser.parse_args().families:
        unet, vae, texts = FAMILIES[family]
        jobs = {"U-Net": lambda name=unet: unet_errors(UNETS[name])}
        jobs["VAE"] = lambda name=vae: vae_errors(*pair(VAES[name]))
        jobs |= {text: lambda name=text: text_errors(TEXT_ENCODERS[name]) for text in texts}
        for part, job in jobs.items():
            start = time.perf_counter()
            errors = ", ".join(f"{what} {error:.1e}" for what, error in job().items())
            print(f"{family:9} {part:12} {errors}  ({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
