"""What users of diffusers type, and what to write here: one table for attributes and arguments alike.

docs/diffusers.md is the same for readers. What works as it is typed is not in it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ldm.diffusion.samplers import resolve_sampler
from ldm.errors import NoSuchName, UserError
from ldm.spelling import unknown

_LORA = "write pipe = pipe.with_lora(FILE, weight), which gives a new pipeline"
_LORA_ON_OFF = "pipe.base is without adapters, and pipe.with_lora(FILE, weight) gives one another weight"
_WORD = "write pipe = pipe.with_embedding(FILE, name), which gives a new pipeline"
_SAMPLER = 'give the call a sampler ("DPMSolverMultistepScheduler", "DPM++ 2M Karras") and a spacing'
_MEMORY = 'there is none: load with dtype="fp16", and draw fewer or smaller pictures at once'
_TILING = "it is so by itself where memory is short, and always after pipe = pipe.with_vae_tiling()"
_NOT_NEEDED = "it is not needed, as attention is never held whole in memory: leave it out"
_CHECKER = "nothing is checked unless you write pipe = pipe.with_safety_checker(FOLDER)"
_MARK = "give the call watermark=True"
_STOP = 'return {"stop": True} from the callback, or raise StopIteration in it'
_SCALE = 'return {"guidance_scale": 5.0} from the callback'
_STEPS = "it is the number that the call was given as num_inference_steps"
_PART = "load with it in place: ldm.load(MODEL, {0}=PLACE), a folder, a file or a hub name"
_IP_ADAPTER = "write pipe = pipe.with_ip_adapter(FILE, ENCODER, scale=0.6), which gives a new pipeline"
_CONTROL = "write pipe = pipe.with_controlnet(FOLDER), and give its call a control_image"
_HUB = "set it for huggingface_hub: HF_HOME, HF_HUB_OFFLINE=1, `hf auth login`"
_EMBEDS = "pipe.text.encode([prompt]) has .tokens (prompt_embeds) and .pooled"
_SIZES = "pipe.vae.downscale is the factor between pixels and latents"
_CALLBACK = "write callback_on_step_end=f, called as f(pipe, step, timestep, {'latents': ...})"
_DEVICE = "give one device: device='cuda'"
_SINGLE = "configs of single files are found by themselves; prediction_type= and vae= correct them"

# Name -> what to write.
INSTEAD: Mapping[str, str] = {
    # adapters
    **dict.fromkeys(("load_lora_weights", "load_lora_into_unet", "load_lora_adapter", "set_adapters"), _LORA),
    **dict.fromkeys(("load_attn_procs", "add_adapter", "attn_processors", "set_attn_processor"), _LORA),
    **dict.fromkeys(("delete_adapters", "disable_lora", "enable_lora", "unload_lora_weights"), _LORA_ON_OFF),
    **dict.fromkeys(("get_active_adapters", "get_list_adapters"), "pipe.adapted.loras are those it has"),
    "fuse_lora": "write pipe = pipe.fuse()",
    "unfuse_lora": "write pipe = pipe.unfuse()",
    "save_lora_weights": "`ldm finetune` writes LoRAs; pipe.fuse().save(FOLDER) saves a model with one",
    "load_textual_inversion": _WORD,
    "unload_textual_inversion": "pipe.base is without adapters",
    **dict.fromkeys(("load_ip_adapter", "set_ip_adapter_scale", "image_encoder"), _IP_ADAPTER),
    "unload_ip_adapter": "pipe.base is without adapters",
    **dict.fromkeys(("controlnet", "adapter"), _CONTROL),
    # samplers and guidance
    "scheduler": _SAMPLER,
    "guider": 'give the call a guidance ("apg:eta=0", docs/guidance.md)',
    **dict.fromkeys(("_interrupt", "interrupt"), _STOP),
    **dict.fromkeys(("_guidance_scale", "do_classifier_free_guidance"), _SCALE),
    **dict.fromkeys(("num_timesteps", "_num_timesteps"), _STEPS),
    **dict.fromkeys(("enable_freeu", "disable_freeu"), "give the call freeu=(b1, b2, s1, s2), or nothing"),
    **dict.fromkeys(("pag_scale", "pag_adaptive_scale"), 'give guidance="pag:scale=3"'),
    **dict.fromkeys(("callback", "callback_steps"), _CALLBACK),
    "max_sequence_length": "prompts of any length are read: leave it out",
    # memory and speed
    **dict.fromkeys(("enable_model_cpu_offload", "enable_sequential_cpu_offload"), _MEMORY),
    **dict.fromkeys(("enable_group_offload", "maybe_free_model_hooks", "remove_all_hooks"), _MEMORY),
    **dict.fromkeys(("enable_vae_tiling", "enable_vae_slicing", "enable_tiling", "enable_slicing"), _TILING),
    **dict.fromkeys(
        ("disable_vae_tiling", "disable_vae_slicing"), "write pipe = pipe.with_vae_tiling(False)"
    ),
    **dict.fromkeys(("enable_attention_slicing", "disable_attention_slicing"), _NOT_NEEDED),
    "enable_xformers_memory_efficient_attention": _NOT_NEEDED,
    "disable_xformers_memory_efficient_attention": _NOT_NEEDED,
    "set_use_memory_efficient_attention_xformers": _NOT_NEEDED,
    **dict.fromkeys(("fuse_qkv_projections", "unfuse_qkv_projections"), "write pipe = pipe.compiled()"),
    **dict.fromkeys(("upcast_vae", "needs_upcasting"), "a VAE that overflows in fp16 runs in fp32 by itself"),
    **dict.fromkeys(("half", "float", "bfloat16"), "write pipe = pipe.to(torch.float16), or another dtype"),
    "cpu": 'write pipe = pipe.to("cpu")',
    # parts
    "components": "pipe.parts has them by name",
    "encode_prompt": _EMBEDS,
    "_encode_prompt": _EMBEDS,
    **dict.fromkeys(("vae_scale_factor", "vae_scaling_factor", "default_sample_size"), _SIZES),
    **dict.fromkeys(("image_processor", "mask_processor"), "the call takes PIL images, arrays and tensors"),
    **dict.fromkeys(("decode_latents", "numpy_to_pil"), "pipe.decode(latents) gives [B, 3, H, W] in 0..1"),
    "prepare_latents": "give the call latents of unit noise, or a seed",
    "check_inputs": "pipe.prepare(request) says what is wrong with one",
    "config": "pipe.parts has the modules, each with its .config",
    "from_pipe": "one pipeline draws from texts, images and masks: give image, mask_image to its call",
    "register_modules": _PART.format("unet"),
    "push_to_hub": "write pipe.save(FOLDER), then `hf upload NAME FOLDER`",
    **dict.fromkeys(("progress_bar", "_progress_bar_config"), "Python draws no bar: callback_on_step_end"),
    # loading
    **dict.fromkeys(("safety_checker", "feature_extractor", "requires_safety_checker"), _CHECKER),
    **dict.fromkeys(("run_safety_checker", "load_safety_checker"), _CHECKER),
    **dict.fromkeys(("watermark", "watermarker", "add_watermarker"), _MARK),
    **dict.fromkeys(("cache_dir", "token", "use_auth_token", "local_files_only", "proxies"), _HUB),
    **dict.fromkeys(("force_download", "resume_download", "mirror"), _HUB),
    **dict.fromkeys(("device_map", "max_memory", "offload_folder", "hf_device_map"), _DEVICE),
    **dict.fromkeys(("custom_pipeline", "custom_revision", "trust_remote_code"), "code of models never runs"),
    **dict.fromkeys(("original_config", "original_config_file", "config_file", "model_type"), _SINGLE),
    "extract_ema": "write ema=True",
    "use_safetensors": "safetensors come first, and .bin is read without running code: leave it out",
    "subfolder": "a pipeline's folder is given whole; one part from elsewhere by unet=, vae=, text_encoder=",
    "from_flax": "convert the weights to safetensors first",
    "use_onnx": "convert the weights to safetensors first",
    "quantization_config": 'weights are bf16, fp16 or fp32: dtype="fp16"',
    "tokenizer": "it is that of the text encoder: ldm.load(MODEL, text_encoder=PLACE)",
    "tokenizer_2": "it is that of the text encoder: ldm.load(MODEL, text_encoder_2=PLACE)",
    **{name: _PART.format(name) for name in ("unet", "vae", "text_encoder", "text_encoder_2")},
}
# Arguments of diffusers' loaders that change nothing here, with the values of which that is true; None: any.
HARMLESS: Mapping[str, tuple[object, ...] | None] = {
    "safety_checker": (None,),
    "requires_safety_checker": (False,),
    "load_safety_checker": (False, None),
    "feature_extractor": (None,),
    "image_encoder": (None,),
    "use_safetensors": (True, None),  # chosen where both are there
    "low_cpu_mem_usage": None,  # always so
    "add_watermarker": (False, None),
    "device_map": (None,),
    "custom_pipeline": (None,),
    "local_files_only": (False,),
    "force_download": (False,),
    "cache_dir": (None,),
    "token": (None,),
    "original_config": (None,),
    "config": (None,),
    "offload_state_dict": None,
}


def lookup(name: str) -> str | None:
    """One line for an attribute that diffusers' pipelines have; None for another."""
    return f"{name} is of diffusers: here, {INSTEAD[name]}" if name in INSTEAD else None


def refuse_arguments(given: Collection[str], known: Collection[str]) -> None:
    """Raise UserError for the first argument that is not known: what to write, or the nearest name."""
    for name in given:
        raise UserError(lookup(name) or str(unknown("argument", name, known)))


def refuse_loading(given: Mapping[str, Any], known: Collection[str]) -> None:
    """As `refuse_arguments`, for those of `ldm.load` that are not harmless."""
    for name, value in given.items():
        values = HARMLESS.get(name, ())
        if values is not None and not any(value is each for each in values):
            refuse_arguments([name], known)


def refuse_modules(**parts: object) -> None:
    """Raise UserError for a part that is given as a module: it is loaded from where it lies."""
    for name, value in parts.items():
        if value is not None and not isinstance(value, str) and not hasattr(value, "__fspath__"):
            raise UserError(f"{name} is a {type(value).__name__}, and not where it lies: {INSTEAD[name]}")


def assignment(name: str, value: object) -> NoSuchName:
    """The error for `pipe.name = value`."""
    what = type(value).__name__
    if name == "scheduler":
        try:
            sampler, _ = resolve_sampler(what)
        except UserError:
            return NoSuchName(f"a pipeline never changes: {_SAMPLER}")
        return NoSuchName(
            f'a pipeline never changes: give the call sampler="{sampler.name}"{_spacing(value)}'
        )
    if what == "OptimizedModule":
        return NoSuchName("a pipeline never changes: write pipe = pipe.compiled()")
    return NoSuchName(f"a pipeline never changes: {INSTEAD.get(name, 'its methods give new ones')}")


def _spacing(scheduler: object) -> str:
    """What diffusers' scheduler says of the spacing, as an argument."""
    config = getattr(scheduler, "config", {})
    for name in ("karras", "exponential", "beta"):
        if config.get(f"use_{name}_sigmas"):
            return f', spacing="{name}"'
    return ""
