"""diffusers' ``scheduler_config.json``: every key is honoured, known to be harmless, or refused by name."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.bounds import Bounds
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.samplers import resolve_sampler
from ldm.errors import UserError

# The betas of diffusers' classes where the config is silent: (beta_start, beta_end, beta_schedule).
_LINEAR, _STABLE_DIFFUSION = (0.0001, 0.02, "linear"), (0.00085, 0.012, "linear")
_CLASSES = {
    "DDPMScheduler": _LINEAR,
    "DDIMScheduler": _LINEAR,
    "PNDMScheduler": _LINEAR,
    "EulerDiscreteScheduler": _LINEAR,
    "EulerAncestralDiscreteScheduler": _LINEAR,
    "HeunDiscreteScheduler": _STABLE_DIFFUSION,
    "LMSDiscreteScheduler": _LINEAR,
    "DPMSolverMultistepScheduler": _LINEAR,
    "DPMSolverSinglestepScheduler": _LINEAR,
    "DPMSolverSDEScheduler": _STABLE_DIFFUSION,
    "UniPCMultistepScheduler": _LINEAR,
    "LCMScheduler": (0.00085, 0.012, "scaled_linear"),
    "KDPM2DiscreteScheduler": _STABLE_DIFFUSION,
    "KDPM2AncestralDiscreteScheduler": _STABLE_DIFFUSION,
    "TCDScheduler": (0.00085, 0.012, "scaled_linear"),
    "DDIMParallelScheduler": _LINEAR,
    "DDPMParallelScheduler": _LINEAR,
}
_DEFAULT_CLASS = "DDIMScheduler"

_HONOURED = {
    "_class_name", "algorithm_type", "beta_end", "beta_schedule", "beta_start", "clip_sample",
    "clip_sample_range", "dynamic_thresholding_ratio", "euler_at_final", "final_sigmas_type",
    "lower_order_final", "num_train_timesteps", "original_inference_steps", "prediction_type",
    "rescale_betas_zero_snr", "sample_max_value", "set_alpha_to_one", "steps_offset", "thresholding",
    "timestep_spacing", "trained_betas", "use_beta_sigmas", "use_exponential_sigmas", "use_karras_sigmas",
    "use_lu_lambdas", "variance_type",
}  # fmt: skip

# Versions, details of features that are refused below, and:
# `timestep_scaling` is in LCM's boundary condition, which is below 1e-5;
# `noise_sampler_seed` is the request's seed here;
# `skip_prk_steps` chooses PNDM's warm-up: ours is always PLMS's, as in every Stable Diffusion.
_HARMLESS = {
    "_diffusers_version", "_use_default_values", "flow_shift", "noise_sampler_seed", "skip_prk_steps",
    "tensor_format", "time_shift_type", "timestep_scaling",
}  # fmt: skip

# Settings of diffusers' pipelines and of its schedulers for other models, which its `from_config` passes on
# and the classes above leave unread: so do we, and say it.
_FOREIGN = {
    "add_watermarker", "base_image_seq_len", "base_shift", "clip_denoised", "corrector_order", "eta",
    "feature_extractor", "force_zeros_for_empty_prompt", "image_encoder", "invert_sigmas",
    "low_res_scheduler", "max_image_seq_len", "max_shift", "predictor_order", "requires_aesthetics_score",
    "requires_safety_checker", "rho", "s_churn", "s_max", "s_min", "s_noise", "safety_checker", "scheduler",
    "shift", "sigma_data", "sigma_schedule", "snr", "snr_shift_scale", "stochastic_sampling", "tau_func",
    "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae", "watermarker",
}  # fmt: skip

# Keys that may only say that a feature is off.
_OFF: dict[str, tuple[Any, ...]] = {
    "disable_corrector": ([], ()),
    "interpolation_type": ("linear",),
    "lambda_min_clipped": (-math.inf, "-inf", "-Infinity"),
    "predict_epsilon": (True,),
    "predict_x0": (True,),
    "shift_terminal": (None,),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "solver_order": (2,),
    "solver_p": (None,),
    "solver_type": ("midpoint", "bh2"),
    "timestep_type": ("discrete",),
    "use_dynamic_shifting": (False,),
    "use_flow_sigmas": (False,),
}

_ALGORITHMS = {"dpmsolver++": "", "sde-dpmsolver++": "_sde"}
_SPACINGS = {None: None, "leading": "leading", "trailing": "trailing", "linspace": "linspace"}
# As in diffusers' DDPMScheduler, whose fixed_small_log draws what fixed_small draws. Its fixed_large_log is
# not here as it takes the root of a log, which is NaN, nor its learned, the root of any number of a network.
_VARIANCES = {
    None: "fixed_small",
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}
_FINAL = {"zero": "zero", "sigma_min": "sigma_min"}


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ldm.diffusion.schedule.Schedule` that a scheduler config describes.

    Raises:
        UserError: for a class, key or value that would change the picture and is not supported.
    """
    for key, value in config.items():
        if key in _OFF and value not in _OFF[key]:
            raise UserError(f"scheduler_config.json: {key}={value!r} is not supported; {_OFF[key][0]!r} is")
    class_name, alphas_cumprod = config.get("_class_name", _DEFAULT_CLASS), noise_levels(config)
    return {
        "alphas_cumprod": alphas_cumprod,
        "prediction": _choice(
            config, "prediction_type", "epsilon", {each.value: each for each in Prediction}
        ),
        "default_sampler": resolve_sampler(class_name)[0].name + _algorithm(config, class_name),
        "timestep_spacing": _choice(config, "timestep_spacing", None, _SPACINGS),
        "sigma_spacing": _sigma_spacing(config),
        "steps_offset": config.get("steps_offset", 0),
        "set_alpha_to_one": config.get("set_alpha_to_one"),
        "final_sigmas_type": _choice(config, "final_sigmas_type", "zero", _FINAL),
        "bounds": _bounds(config),
        "variance": _choice(config, "variance_type", "fixed_small", _VARIANCES),
        "lower_order_final": config.get("lower_order_final"),
        "euler_at_final": bool(config.get("euler_at_final")),
        "lcm_steps": config.get("original_inference_steps", 50),
    }


def noise_levels(config: Mapping[str, Any]) -> Tensor:
    """alphas_cumprod [T] in fp64: all that noising wants of a scheduler config, as of `low_res_scheduler`.

    Keys that only matter for the way back, such as `solver_order`, may have any value. Warns of keys that
    diffusers has elsewhere and does not read here.

    Raises:
        UserError: for a class or key that is not known, and for betas that are not supported.
    """
    class_name = config.get("_class_name", _DEFAULT_CLASS)
    for key in sorted(config.keys() - _OFF.keys() - _HONOURED - _HARMLESS):
        if key not in _FOREIGN:
            raise UserError(f"scheduler_config.json: unknown key {key!r}; remove it if it does not matter")
        warnings.warn(
            f"scheduler_config.json: {key} is no setting of {class_name}, and ignored as in diffusers",
            stacklevel=2,
        )
    if class_name not in _CLASSES:
        raise UserError(
            f"scheduler_config.json: {class_name} is not supported; one of {', '.join(_CLASSES)} is"
        )
    return torch.cumprod(1 - _betas(config, *_CLASSES[class_name]), dim=0).double()


def _betas(config: Mapping[str, Any], start: float, end: float, kind: str) -> Tensor:
    """fp32, and their running product too, as in diffusers: a model was trained on those very numbers."""
    steps = config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", start), config.get("beta_end", end)
    kind = config.get("beta_schedule", kind)
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
    elif kind == "linear":
        betas = torch.linspace(start, end, steps)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps) ** 2
    elif kind == "sigmoid":
        # Xu et al. 2022, "GeoDiff", as in diffusers' DDPMScheduler.
        betas = torch.sigmoid(torch.linspace(-6, 6, steps)) * (end - start) + start
    elif kind == "squaredcos_cap_v2":
        # Nichol and Dhariwal 2021, equation 17.
        bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        betas = torch.tensor([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(steps)])
    else:
        raise UserError(f"scheduler_config.json: beta_schedule={kind!r} is not supported; 'scaled_linear' is")
    return zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr") else betas


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale ``sqrt(alphas_cumprod)`` so that it ends at 0; betas [T] to betas [T].

    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1.
    """
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    cumprod = root**2
    return 1 - torch.cat([cumprod[:1], cumprod[1:] / cumprod[:-1]])


def _choice(config: Mapping[str, Any], key: str, default: str | None, table: Mapping[Any, Any]) -> Any:
    value = config.get(key, default)
    if value not in table:
        known = ", ".join(each for each in table if each)
        raise UserError(f"scheduler_config.json: {key}={value!r} is not supported; one of {known} is")
    return table[value]


def _bounds(config: Mapping[str, Any]) -> Bounds | None:
    """None where nothing is bounded: also where `clip_sample` is absent, as latents are not pixels."""
    names = Bounds.__dataclass_fields__.keys()
    bounds = Bounds(**{name: config[name] for name in names if config.get(name) is not None})
    for name in names:
        value = getattr(bounds, name)
        if not isinstance(value, bool if name in ("clip_sample", "thresholding") else int | float):
            raise UserError(f"scheduler_config.json: {name}={value!r} is not supported; a number is")
    return bounds if bounds.clip_sample or bounds.thresholding else None


def _algorithm(config: Mapping[str, Any], class_name: str) -> str:
    suffix = str(_choice(config, "algorithm_type", "dpmsolver++", _ALGORITHMS))
    if suffix and class_name != "DPMSolverMultistepScheduler":
        raise UserError(
            f"scheduler_config.json: algorithm_type='sde-dpmsolver++' is not supported in {class_name}"
        )
    return suffix


def _sigma_spacing(config: Mapping[str, Any]) -> str | None:
    keys = ("use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas")
    asked = next((key for key in keys if config.get(key)), None)
    return asked and asked.removeprefix("use_").removesuffix("_sigmas")
