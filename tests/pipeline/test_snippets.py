"""What users of diffusers type: each line works, or its error names what to write here."""

import re

import diffusers
import pytest

import ldm
from ldm import cli
from ldm.pipeline.model.diffusers_names import HARMLESS, INSTEAD

WORKS = """
    pipe("sea", generator=torch.Generator().manual_seed(0), **few)
    pipe("sea", generator=[torch.Generator().manual_seed(0)], **few)
    pipe(["sea", "boat"], negative_prompt=["red", "the"], **few)
    pipe("sea", num_images_per_prompt=2, **few)
    pipe("sea", num_inference_steps=2, output_type="latent")
    pipe("sea", callback_on_step_end=lambda p, i, t, kwargs: {}, **few)
    pipe("sea", callback_on_step_end=lambda p, i, t, kwargs: kwargs, **few)
    pipe("sea", callback_on_step_end=lambda p, i, t, kwargs: {"latents": kwargs["latents"].half()}, **few)
    pipe("sea", timesteps=torch.tensor([900, 500, 100]), output_type="latent")
    pipe("sea", sigmas=np.array([10.0, 1.0, 0.0]), output_type="latent")
    pipe("sea", latents=torch.randn(1, 4, 8, 8, dtype=torch.float16), **few)
    pipe("sea", image=img, **few)
    pipe("sea", sampler="DPMSolverMultistepScheduler", **few)
    pipe("sea", clip_skip=1, **few)
    pipe("sea", eta=0.0, **few)
    pipe.to_diffusers()
    pipe.to("cpu")
    pipe.to(torch.float16)
    pipe.to("cpu", torch.bfloat16)
    pipe.to(device="cpu", dtype=torch.float16, silence_dtype_warnings=True)
    ldm.load(path, torch_dtype=torch.float16, safety_checker=None, **cpu)
    ldm.load(path, torch_dtype="auto", use_safetensors=True, low_cpu_mem_usage=True, **cpu)
    Pipeline.from_pretrained(path, requires_safety_checker=False, feature_extractor=None, **cpu)
    Pipeline.from_single_file(path, load_safety_checker=False, cache_dir=None, **cpu)
    pipe.set_progress_bar_config(disable=True)
    pipe("sea", callback_on_step_end_tensor_inputs=["latents"], **few)
    pipe("sea", callback_on_step_end_tensor_inputs=["prompt_embeds", "negative_prompt_embeds"], **few)
    pipe("sea", callback_on_step_end=lambda p, i, t, kwargs: {"stop": True}, **few)
    pipe("sea", **few)[0]
    pipe("sea", return_dict=False, **few)[0]
    pipe("sea", **few)["images"]
    pipe("sea", **few).nsfw_content_detected
    pipe.vae.decode(torch.zeros(1, 4, 8, 8) / pipe.vae.config.scaling_factor).sample
    pipe.vae.decode(torch.zeros(1, 4, 8, 8) / pipe.vae.config.scaling_factor, return_dict=False)[0]
    pipe.vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist.sample() * pipe.vae.config.scaling_factor
    pipe("sea", image=np.asarray(img), **few)
    pipe("sea", image=[img], **few)
    pipe(["sea", "boat"], image=[img, img2], **few)
    pipe("sea", image=[img, img2], **few)
    pipe("sea", image=torch.rand(2, 3, 16, 16), **few)
    pipe("sea", image=torch.randn(1, 4, 8, 8), **few)
    pipe("sea", seed=np.int64(3), **few)
    pipe("sea", seed=torch.tensor(3), **few)
    pipe("sea", seed=np.array([3]), **few)
    pipe("sea", cross_attention_kwargs={"scale": 0.5}, **few)
    pipe.with_lora(lora)("sea", cross_attention_kwargs={"scale": 0.5}, **few)
    pipe("sea", guidance_rescale=0.5, guidance_scale=3, **few)
    pipe(prompt_embeds=embeds, negative_prompt_embeds=embeds, **few)
    pipe(prompt_embeds=torch.cat([embeds, embeds]), negative_prompt_embeds=torch.cat([embeds, embeds]), **few)
    pipe(np.array(["sea", "boat"]), **few)
    pipe.save_pretrained(out, safe_serialization=True)
    pipe.to("cpu").unet.compile(backend="eager")
    pipe.compiled(backend="eager")("sea", **few)
    pipe.tokenizer("sea").input_ids
    pipe.text_encoder(pipe.tokenizer(["sea"], padding="max_length", return_tensors="pt").input_ids)[0]
    pipe.text_encoder.config.hidden_size
    pipe.device.type, pipe.dtype, pipe.vae.config.scaling_factor, pipe.unet.config.sample_size
"""

# What is typed -> what the error must name.
SAYS = [
    ('pipe.to("cuda:9")', "is not there"),
    ("pipe.cuda(9)", "is not there"),
    ("pipe.to(torch.int8)", "bf16, fp16 or fp32"),
    ("pipe.to('cpu', non_blocking=True)", "a device, a dtype"),
    ("ldm.load(path, safety_checker=theirs, **cpu)", "with_safety_checker"),
    ("ldm.load(path, cache_dir='here', **cpu)", "HF_HOME"),
    ("ldm.load(path, token='hf_x', **cpu)", "hf auth login"),
    ("ldm.load(path, device_map='balanced', **cpu)", "device="),
    ("ldm.load(path, custom_pipeline='lpw', **cpu)", "never runs"),
    ("ldm.load(path, scheduler=theirs.scheduler, **cpu)", "sampler"),
    ("ldm.load(path, vae=theirs.vae, **cpu)", "vae=PLACE"),
    ("ldm.load(path, use_safetensors=False, **cpu)", "leave it out"),
    ("ldm.load(path, dtype='fp16', torch_dtype=torch.float32, **cpu)", "dtype alone"),
    ("ldm.load(path, subfolder='unet', **cpu)", "unet="),
    ("ldm.load(path, dtipe='fp16', **cpu)", "did you mean dtype"),
    ("pipe.load_lora_weights(lora)", "with_lora"),
    ("pipe.fuse_lora()", "pipe.fuse()"),
    ("pipe.unload_lora_weights()", "pipe.base"),
    ("pipe.set_adapters(['a'], [0.5])", "with_lora"),
    ("pipe.load_textual_inversion(lora)", "with_embedding"),
    ("pipe.load_ip_adapter('h94/IP-Adapter')", "pipe.with_ip_adapter"),
    ("pipe.unload_ip_adapter()", "pipe.base"),
    ("pipe.scheduler.config", "sampler"),
    (
        "setattr(pipe, 'scheduler', diffusers.EulerDiscreteScheduler.from_config(theirs.scheduler.config))",
        'sampler="euler"',
    ),
    (
        "setattr(pipe, 'scheduler', diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True))",
        'sampler="dpmpp_2m", spacing="karras"',
    ),
    ("setattr(pipe, 'unet', torch.compile(pipe.unet))", "pipe.compiled()"),
    ("setattr(pipe, 'vae', theirs.vae)", "vae=PLACE"),
    ("setattr(pipe, 'anything', 1)", "never changes"),
    ("setattr(pipe, '_interrupt', True)", "StopIteration"),
    ("setattr(pipe, '_guidance_scale', 0.0)", "guidance_scale"),
    ("pipe.num_timesteps", "num_inference_steps"),
    ("pipe.enable_model_cpu_offload()", "fp16"),
    ("pipe.enable_sequential_cpu_offload()", "fp16"),
    ("pipe.enable_vae_tiling()", "pipe.with_vae_tiling()"),
    ("pipe.enable_vae_slicing()", "where memory is short"),
    ("pipe.enable_attention_slicing()", "not needed"),
    ("pipe.enable_xformers_memory_efficient_attention()", "not needed"),
    ("pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)", "freeu="),
    ("pipe.components", "pipe.parts"),
    ("pipe.encode_prompt('sea', 'cpu', 1, True)", "pipe.text.encode"),
    ("pipe.vae_scale_factor", "downscale"),
    ("pipe.image_processor", "PIL images"),
    ("pipe.push_to_hub('me/model')", "pipe.save"),
    ("pipe('sea', image='https://example.com/boat.png')", "not fetched"),
    ("pipe('sea', image=['http://example.com/boat.png'])", "not fetched"),
    ("pipe('sea', image=[img, img2, img])", None),
    ("pipe(['sea', 'boat'], image=[img, img2, img])", "one for each"),
    ("pipe('sea', image=5)", "PIL image, array or tensor"),
    ("pipe('sea', image=[])", "no pictures"),
    ("pipe('sea', image=np.full((8, 8, 3), 300))", "0..255"),
    ("pipe('sea', image=np.full((8, 8, 3), 2.5))", "0..1"),
    ("pipe('sea', image=torch.zeros(1, 4, 8, 8), height=32, width=32)", "leave height and width out"),
    ("pipe('sea', image=torch.zeros(1, 4, 8, 8), mask_image=img)", "picture itself"),
    ("pipe('sea', seed=3.5)", "whole number"),
    ("pipe('sea', seed='3')", "whole number"),
    ("pipe('sea', seed=[1, 'a'])", "whole number"),
    ("pipe(5)", "a text, or a list of texts"),
    ("pipe(b'sea')", "a text, or a list of texts"),
    ("pipe([5])", "prompt 5"),
    ("pipe('sea', negative_prompt=5)", "a text, or a list of texts"),
    ("pipe('sea', generator=[1])", "torch.Generator"),
    ("pipe('sea', generator=7)", "torch.Generator"),
    ("pipe('sea', cross_attention_kwargs={'gligen': 1})", "only scale"),
    ("pipe('sea', ip_adapter_image=img)", "with_ip_adapter"),
    ("pipe('sea', ip_adapter_image_embeds=[embeds])", "with_ip_adapter"),
    ("pipe('sea', callback=print, callback_steps=1)", "callback_on_step_end"),
    ("pipe('sea', max_sequence_length=77)", "any length"),
    ("pipe('sea', negative_promt='red')", "did you mean negative_prompt"),
    ("pipe('sea', callback_on_step_end_tensor_inputs=['mask'])", "prompt_embeds"),
    ("pipe('sea', callback_on_step_end=lambda *_: {'noise': 1}, **few)", "prompt_embeds"),
    ("pipe('sea', callback_on_step_end=lambda p, *_: setattr(p, '_interrupt', True), **few)", "stop"),
    ("pipe('sea', callback_on_step_end=lambda *_: {'latents': 5}, **few)", "[1, 4, 8, 8]"),
    (
        "pipe('sea', callback_on_step_end=lambda *_: {'prompt_embeds': torch.zeros(2, 9, 24)}, **few)",
        "[2, 16, 24]",
    ),
    ("pipe('sea', spacing='DPMSolverMultistepScheduler')", "for a sampler use --sampler dpmpp_2m"),
    ("pipe('sea', spacing='euler_a')", "for a sampler use --sampler euler_a"),
    ("pipe.with_lora('nobody/nothing-here')", "hub"),
    ("pipe.with_embedding('nobody/nothing-here')", "hub"),
    ("pipe.with_lora('loras/missing.safetensors')", "no such file"),
    ("ldm.StableDiffusionPipeline", "ldm.load"),
    ("ldm.AutoPipelineForText2Image", "ldm.load"),
    ("ldm.EulerDiscreteScheduler", "sampler="),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "line",
    [  # test_call.py has what torch.compile takes long to read
        pytest.param(line.strip(), marks=pytest.mark.slow if "compile" in line else ())
        for line in WORKS.strip().splitlines()
    ],
)
def test_works_as_typed(made, line):
    assert eval(line, dict(made)) is not ...


@pytest.mark.parametrize(("line", "named"), SAYS, ids=[line for line, _ in SAYS])
def test_the_error_names_what_to_write(made, line, named):
    if named is None:  # one prompt for several pictures
        assert len(eval(line.replace(")", ", **few)"), dict(made)).images) == 3
        return
    with pytest.raises((ldm.UserError, ImportError)) as caught:
        eval(line, dict(made))
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def test_the_loaders_are_one():
    assert ldm.Pipeline.from_pretrained is ldm.Pipeline.from_single_file is ldm.load
    for name, values in HARMLESS.items():
        assert values is None or name in INSTEAD, name


def test_every_name_of_diffusers_pipelines_works_or_says_what_to_write(made):
    """All that a pipeline of diffusers has, and we might be asked for."""
    pipe, silent = made["pipe"], []
    cls = diffusers.StableDiffusionPipeline
    names = [name for name in dir(cls) if not name.startswith("_")]
    for name in names:
        if name in INSTEAD or OWN_FILES.match(name):
            continue
        if not hasattr(pipe, name):
            silent.append(name)
    assert set(silent) <= LEFT_OUT, set(silent) - LEFT_OUT


# What concerns its own files and configs.
OWN_FILES = re.compile(
    "(load_config|from_config|from_flax|config_name|save_config|get_config|to_json|extract|register|download"
    "|dict_from|model_cpu|hf_|ignore_|has_compat|is_save|dtype$|name_or_path)"
)
# Inner workings, which no example of diffusers' documentation calls.
LEFT_OUT = {
    "get_guidance_scale_embedding",
    "parameters",
    "set_attention_slice",
    "get_timesteps",
    "guidance_scale",
    "guidance_rescale",
    "clip_skip",
    "cross_attention_kwargs",
    "prepare_extra_step_kwargs",
    "prepare_ip_adapter_image_embeds",
    "encode_image",
    "lora_scale",
    "num_fused_loras",
    "fused_loras",
    "set_lora_device",
    "lora_state_dict",
    "write_lora_layers",
    "pack_weights",
    "load_lora_into_text_encoder",
    "load_lora_metadata",
    "unet_name",
    "text_encoder_name",
    "transformer_name",
    "maybe_convert_prompt",
    "enable_lora_hotswap",
    "reset_device_map",
    "compile_repeated_blocks",
    "set_attention_backend",
}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--scheduler", "DPMSolverMultistepScheduler"], "for a sampler use --sampler dpmpp_2m"),
        (["--init-image", "https://example.com/a.png"], "addresses are not fetched"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_command_line_says_so_too(made, flags, named, capsys, tmp_path):
    common = ["-m", made["path"], "--device", "cpu", "-p", "sea", "--outdir", str(tmp_path / "out")]
    assert cli.txt2img([*common, *flags]) == 2
    assert named in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))
