"""The `config.json` of well-known models, key for key as on the hub: old ones have few keys, new ones all."""

OLD_UNET = {  # as diffusers 0.6 wrote it
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SINCE_0_11 = {
    "_diffusers_version": "0.11.0",
    "class_embed_type": None,
    "dual_cross_attention": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "upcast_attention": False,
    "use_linear_projection": False,
}
NEW_UNET = OLD_UNET | SINCE_0_11 | {
    "_diffusers_version": "0.24.0.dev0",
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dropout": 0.0,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "num_attention_heads": None,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
}  # fmt: skip
OPEN_CLIP = {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
XL = NEW_UNET | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
EMA = {
    "decay": 0.9999,
    "inv_gamma": 1.0,
    "min_decay": 0.0,
    "optimization_step": 37000,
    "power": 0.6666666666666666,
    "update_after_step": 0,
    "use_ema_warmup": False,
}

UNETS = {
    "sd1": OLD_UNET,
    "sd1_inpaint": OLD_UNET | {"in_channels": 9},
    "instruct_pix2pix": OLD_UNET | SINCE_0_11 | {"in_channels": 8},
    "sd2_base": OLD_UNET | OPEN_CLIP | {"dual_cross_attention": False},
    "sd2_768": OLD_UNET | SINCE_0_11 | OPEN_CLIP | {"sample_size": 96, "upcast_attention": True},
    "sd2_inpaint": OLD_UNET | OPEN_CLIP | {"dual_cross_attention": False, "in_channels": 9},
    "sd_turbo": NEW_UNET | OPEN_CLIP,
    "lcm": NEW_UNET | {"sample_size": 96, "time_cond_proj_dim": 256, "upcast_attention": None},
    "upscaler": OLD_UNET
    | {
        "block_out_channels": [256, 512, 512, 1024],
        "cross_attention_dim": 1024,
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
        "dual_cross_attention": False,
        "in_channels": 7,
        "num_class_embeds": 1000,
        "only_cross_attention": [True, True, True, False],
        "sample_size": 128,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
        "use_linear_projection": True,
    },
    "sdxl": XL,
    "sdxl_inpaint": XL | EMA | {"in_channels": 9},
    "refiner": XL
    | {
        "attention_head_dim": [6, 12, 24, 24],
        "block_out_channels": [384, 768, 1536, 1536],
        "cross_attention_dim": 1280,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "projection_class_embeddings_input_dim": 2560,
        "transformer_layers_per_block": 4,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    },
    "small_sd": NEW_UNET  # distilled: BK-SDM-Small, and so are its SDXL kin below
    | {"layers_per_block": 1, "mid_block_type": None},
    "tiny_sd": NEW_UNET
    | {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3,
        "layers_per_block": 1,
        "mid_block_type": None,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3,
    },
    "ssd_1b": XL
    | {
        "mid_block_type": "UNetMidBlock2D",
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    },
    "koala_700m": XL
    | {"layers_per_block": 1, "mid_block_type": None, "transformer_layers_per_block": [1, 2, 5]},
}

OLD_VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
VAES = {
    "sd1": OLD_VAE,
    "sd2": OLD_VAE | {"sample_size": 768},
    "sd_vae_ft_mse": OLD_VAE | {"_diffusers_version": "0.4.2", "sample_size": 256},
    "sd_turbo": OLD_VAE | {"force_upcast": True, "sample_size": 768, "scaling_factor": 0.18215},
    "sdxl": OLD_VAE | {"force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025},
    "sdxl_fp16_fix": OLD_VAE
    | {
        "force_upcast": False,
        "latents_mean": None,
        "latents_std": None,
        "mid_block_add_attention": True,
        "sample_size": 512,
        "scaling_factor": 0.13025,
        "shift_factor": None,
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    },
    "upscaler": OLD_VAE
    | {
        "block_out_channels": [128, 256, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "sample_size": 256,
        "scaling_factor": 0.08333,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
    },
    "taesd": {
        "_class_name": "AutoencoderTiny",
        "_diffusers_version": "0.20.0.dev0",
        "act_fn": "relu",
        "decoder_block_out_channels": [64, 64, 64, 64],
        "encoder_block_out_channels": [64, 64, 64, 64],
        "force_upcast": False,
        "in_channels": 3,
        "latent_channels": 4,
        "latent_magnitude": 3,
        "latent_shift": 0.5,
        "num_decoder_blocks": [3, 3, 3, 1],
        "num_encoder_blocks": [1, 3, 3, 3],
        "out_channels": 3,
        "scaling_factor": 1.0,
        "upsampling_scaling_factor": 2,
    },
}
VAES["taesdxl"] = VAES["taesd"] | {"block_out_channels": [64, 64, 64, 64], "shift_factor": 0.0}

BETAS = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "trained_betas": None,
}
SD1_SCHEDULER = BETAS | {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
XL_SCHEDULER = SD1_SCHEDULER | {
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
SCHEDULERS = {
    "sd1": SD1_SCHEDULER,
    "sd2_base": SD1_SCHEDULER | {"prediction_type": "epsilon"},
    "sd2_768": SD1_SCHEDULER | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "instruct_pix2pix": SD1_SCHEDULER
    | {"_class_name": "EulerAncestralDiscreteScheduler", "prediction_type": "epsilon"},
    "upscaler": SD1_SCHEDULER
    | {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.02,
        "beta_start": 0.0001,
        "prediction_type": "v_prediction",
    },
    "sdxl": XL_SCHEDULER,
    "sd_turbo": XL_SCHEDULER
    | {"sigma_max": None, "sigma_min": None, "timestep_spacing": "trailing", "timestep_type": "discrete"},
    "sdxl_turbo": XL_SCHEDULER
    | {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    "lightning": XL_SCHEDULER
    | {
        "final_sigmas_type": "zero",
        "rescale_betas_zero_snr": False,
        "sigma_max": None,
        "sigma_min": None,
        "timestep_spacing": "trailing",
        "timestep_type": "discrete",
        "use_beta_sigmas": False,
        "use_exponential_sigmas": False,
    },
    "xl_zero_snr": XL_SCHEDULER
    | {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
    "lcm": BETAS
    | {
        "_class_name": "LCMScheduler",
        "_diffusers_version": "0.22.0.dev0",
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.995,
        "original_inference_steps": 50,
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
        "sample_max_value": 1.0,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "thresholding": False,
        "timestep_scaling": 10.0,
        "timestep_spacing": "leading",
    },
    "dpmpp": BETAS
    | {
        "_class_name": "DPMSolverMultistepScheduler",
        "_diffusers_version": "0.30.0",
        "algorithm_type": "dpmsolver++",
        "clip_sample": False,
        "dynamic_thresholding_ratio": 0.995,
        "euler_at_final": False,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": float("-inf"),
        "lower_order_final": True,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "solver_order": 2,
        "solver_type": "midpoint",
        "steps_offset": 1,
        "thresholding": False,
        "timestep_spacing": "linspace",
        "use_karras_sigmas": True,
        "use_lu_lambdas": False,
        "variance_type": None,
    },
}
LOW_RES_SCHEDULER = BETAS | {  # x4 upscaler: only ever adds noise
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.8.0",
    "beta_end": 0.02,
    "beta_start": 0.0001,
    "clip_sample": True,
    "variance_type": "fixed_small",
}

CLIP = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float16",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
TEXT_ENCODERS = {
    "clip_l": CLIP,
    "open_clip_h": CLIP
    | {
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "projection_dim": 512,
    },
    "open_clip_g": CLIP
    | {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
    },
}
