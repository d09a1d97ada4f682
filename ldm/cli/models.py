"""--model and all that changes it: loaded, with adapters and an upscaler."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from ldm.cli.terminal import echo
from ldm.prompts.tags import parse_embedding, parse_lora

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline


def load(args: argparse.Namespace) -> Pipeline:
    from ldm.runtime import set_threads

    if args.threads is not None:
        set_threads(args.threads)
    return add_adapters(load_model(args), args)


def load_model(args: argparse.Namespace) -> Pipeline:
    """--model, and what replaces its parts."""
    import ldm

    if args.quiet:  # before huggingface_hub is loaded, which reads it then
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return ldm.load(
        args.model,
        device=args.device,
        dtype=args.dtype,
        revision=args.revision,
        variant=args.variant,
        unet=args.unet,
        vae=args.vae,
        text_encoder=args.text_encoder,
        text_encoder_2=args.text_encoder_2,
        prediction_type=args.prediction_type,
        ema=args.ema,
        max_memory=max_memory(args),
    )


def max_memory(args: argparse.Namespace) -> int | None:
    """--max-memory in bytes; of --plan so much that nothing is ruled out, and no weights are read."""
    from ldm.memory.sizes import parse_size

    if getattr(args, "plan", False):
        return 2**62
    limit: str | None = getattr(args, "max_memory", None)
    return None if limit is None else parse_size(limit)


def add_adapters(pipe: Pipeline, args: argparse.Namespace) -> Pipeline:
    """--embedding, --lora, --lora-dir, --classifier, --upscaler, --refiner and --safety-checker."""
    for spec in args.embedding:
        name, file = parse_embedding(spec)
        pipe = pipe.with_embedding(file, name)
        echo(args, str(pipe.adapted.embeddings[-1]))
    for spec in args.lora:
        pipe = pipe.with_lora(*parse_lora(spec))
        echo(args, str(pipe.adapted.reports[-1]))
    if args.classifier is not None:
        pipe = pipe.with_classifier(args.classifier)
    if args.upscaler is not None:
        pipe = pipe.with_upscaler(args.upscaler)
    if args.refiner is not None:
        pipe = pipe.with_refiner(args.refiner)
    if args.safety_checker is not None:
        pipe = pipe.with_safety_checker(args.safety_checker or None)
    return replace(pipe, lora_dir=args.lora_dir)
