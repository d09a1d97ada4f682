"""Steps of training, ours and as diffusers' scripts make them, for the rows `lora` and `full`.

Weights have the shapes of Stable Diffusion 1.5 and are random, pictures are of 256 x 256 pixels. diffusers'
loop is that of examples/text_to_image/train_text_to_image.py and train_text_to_image_lora.py: in fp32 as it
is without options (contiguous, the VAE in the loop, AdamW of single tensors), in bf16 with channels_last and
cached latents too. Ours has cached latents always.
"""

from collections.abc import Callable
from typing import Any

RANK = 4
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def ours(lora: bool, bf16: bool, batch: int) -> Callable[[], None]:
    """A step as in `Run.step`, on what the caches hold."""
    import torch

    from ldm.diffusion.schedule import Schedule
    from ldm.models.config import UNetConfig
    from ldm.models.unet import UNet
    from ldm.train.loss import (
        Levels,
        draw_noise,
        draw_timesteps,
        noisy_latents,
        pixel_losses,
        timestep_probabilities,
        training_target,
    )
    from ldm.train.loss_recipe import LossSection
    from ldm.train.optimiser import make_optimiser
    from ldm.train.recipe import OptimiserSection

    dtype = torch.bfloat16 if lora and bf16 else torch.float32
    unet: Any = filled(lambda: UNet(UNetConfig(cross_attention_dim=768)), dtype)
    unet.to(memory_format=torch.channels_last)
    if lora:
        add_lora(unet)
    trained = [p for p in unet.parameters() if p.requires_grad]
    options, settings = LossSection(), OptimiserSection()
    optimiser = make_optimiser(trained, settings)
    levels = Levels(Schedule.from_config(BETAS), options)
    probabilities = timestep_probabilities(options, len(levels.sigma))
    rng = torch.Generator().manual_seed(0)
    x0, tokens = torch.randn(batch, 4, 32, 32), torch.randn(batch, 77, 768)

    def step() -> None:
        t = draw_timesteps(probabilities, batch, rng)
        noise, input_noise = draw_noise(x0.shape, options, rng)
        sample = noisy_latents(x0, input_noise, t, levels)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = unet(sample.to(dtype, memory_format=torch.channels_last), t, tokens.to(dtype))
            losses = pixel_losses(output, training_target(x0, noise, t, levels), options).mean((1, 2))
            loss = (levels.weight[t] * losses).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        float(torch.nn.utils.clip_grad_norm_(trained, 1.0))
        optimiser.step()
        optimiser.zero_grad()

    return step


def theirs(lora: bool, defaults: bool, batch: int) -> Callable[[], None]:
    """A step in the order of diffusers' scripts."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from torch.nn import functional as F
    from transformers import CLIPTextConfig, CLIPTextModel

    low = torch.float32 if defaults else torch.bfloat16
    clip = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text_encoder: Any = filled(lambda: CLIPTextModel(CLIPTextConfig(**clip)), low).requires_grad_(False)
    unet: Any = filled(lambda: UNet2DConditionModel(cross_attention_dim=768), low if lora else torch.float32)
    vae: Any = None
    if defaults:
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        wide = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "sample_size": 512}
        vae = filled(lambda: AutoencoderKL(**blocks, **wide), low).requires_grad_(False)
    else:
        unet.to(memory_format=torch.channels_last)
    unet.train()
    if lora:
        add_lora(unet)
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    scheduler = DDPMScheduler(**BETAS)
    pixels, cached = torch.randn(batch, 3, 256, 256), torch.randn(batch, 4, 32, 32, dtype=low)
    input_ids = torch.randint(0, 49407, (batch, 77))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=not defaults):
            latents = (
                cached if vae is None else vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            )
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (batch,))
            noisy = scheduler.add_noise(latents, noise, timesteps)
            hidden = text_encoder(input_ids, return_dict=False)[0]
            output = unet(noisy, timesteps, hidden, return_dict=False)[0]
            loss = F.mse_loss(output.float(), noise.float(), reduction="mean")
        loss.detach().item()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


def filled(make: Callable[[], Any], dtype: Any) -> Any:
    """A module with random weights of a trained network's size, made in `dtype` at once."""
    import torch

    with torch.device("meta"):
        module = make()
    module = module.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 1:
                p.fill_(float("norm" in name and name.endswith("weight")))
            else:
                p.uniform_(-1, 1).mul_((3 / p[0].numel()) ** 0.5)
        for buffer in module.buffers():  # CLIP's positions
            buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))
    return module


def add_lora(unet: Any) -> None:
    """peft's layers beside the attention's, in fp32, as in diffusers' script."""
    from peft import LoraConfig, inject_adapter_in_model

    unet.requires_grad_(False)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    config = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets)
    inject_adapter_in_model(config, unet)
    for p in unet.parameters():
        if p.requires_grad:
            p.data = p.data.float()
