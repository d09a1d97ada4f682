"""Adapter files for tiny pipelines: made by peft and diffusers, and by hand in the names of kohya."""

import copy

import torch
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_emb_proj"]
LINEAR += ["time_embedding.linear_1"]
CONV = ["conv1", "conv2", "conv_shortcut", "proj_in", "proj_out", "downsamplers.0.conv", "upsamplers.0.conv"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
PATTERNS = {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_v": 1, "conv1": 7}}
TUCKER = {"use_effective_conv2d": True, "init_weights": False}
KINDS = {
    "lora": LoraConfig(r=3, lora_alpha=5, init_lora_weights=False),
    "rslora": LoraConfig(r=4, lora_alpha=3, use_rslora=True, init_lora_weights=False),
    "patterns": LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **PATTERNS),
    "dora": LoraConfig(r=3, lora_alpha=5, use_dora=True, init_lora_weights=False),
    "loha": LoHaConfig(r=2, alpha=3, init_weights=False),
    "loha_tucker": LoHaConfig(r=2, alpha=3, **TUCKER),
    "lokr": LoKrConfig(r=2, alpha=3, init_weights=False),
    "lokr_whole": LoKrConfig(r=64, alpha=32, init_weights=False),
    "lokr_both": LoKrConfig(r=1, alpha=3, decompose_both=True, init_weights=False),
    "lokr_tucker": LoKrConfig(r=2, alpha=3, decompose_factor=4, **TUCKER),
}  # fmt: skip


def peft_copy(module, kind, targets):
    """A copy of a reference module with a random adapter of peft on it."""
    config = copy.deepcopy(KINDS[kind])
    config.target_modules = set(targets)
    torch.manual_seed(3)  # DoRA's magnitudes begin as those of the random rest
    model = get_peft_model(copy.deepcopy(module), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name or "hada_" in name or "lokr_" in name:
                # Large enough that a wrong factor shows, small enough that pictures stay finite.
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save_diffusers(pipe, path, kind="lora", unet=(*LINEAR, *CONV), text=TEXT, metadata=True):
    """A LoRA of all parts of a pipeline, written by diffusers' `save_lora_weights`."""
    arguments = {}
    targets = {"unet": unet, "text_encoder": text, "text_encoder_2": text}
    for part, names in targets.items():
        if names and getattr(pipe, part, None) is not None:
            model = peft_copy(getattr(pipe, part), kind, names)
            # Prefixes are diffusers' own: it loads models without peft's.
            arguments[f"{part}_lora_layers"] = {
                name.removeprefix("base_model.model."): tensor
                for name, tensor in get_peft_model_state_dict(model).items()
            }
            if metadata:
                arguments[f"{part}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    pipe.save_lora_weights(path.parent, weight_name=path.name, **arguments)
    return path


def to_kohya(source, path, alpha=None, rename=lambda name: name):
    """A file of diffusers' in the names of kohya, with `alpha` for each layer."""
    tensors = convert_state_dict_to_kohya(load_file(source))
    tensors = {rename(name): tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    if alpha is not None:
        stems = {name.split(".")[0] for name in tensors}
        tensors |= {f"{stem}.alpha": torch.tensor(float(alpha)) for stem in stems}
    save_file(tensors, path)
    return path


def save_lycoris(model, path):
    """peft's LoHa or LoKr of a U-Net in the names of LyCORIS, which keeps alpha with each layer."""
    alpha = float(model.peft_config["default"].alpha)
    tensors = {}
    for name, tensor in get_peft_model_state_dict(model).items():
        module, _, role = name.removeprefix("base_model.model.").rpartition(".")
        stem = "lora_unet_" + module.replace(".", "_")
        tensors[f"{stem}.{role}"] = tensor.contiguous()
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def edit_file(path, change, to=None):
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, to or path)
    return to or path


def save_a1111(path, vectors, name="inner", parameter_dict=False):
    """A textual inversion as AUTOMATIC1111 writes it, or as the paper's own code does."""
    params = {"*": vectors}
    if parameter_dict:
        params = torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)})
    content = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": params}
    if not parameter_dict:
        content |= {"name": name, "step": 500, "sd_checkpoint": "4bdfc29c", "sd_checkpoint_name": "sd"}
    torch.save(content, path)
    return path
