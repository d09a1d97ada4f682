"""`ldm merge`: one model of several, tensor by tensor, that says what it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint.fill import is_finite, let_go
from ldm.checkpoint.io import Later
from ldm.checkpoint.merge.alike import check_alike, differences
from ldm.checkpoint.merge.mixing import BASE, BlockWeights, Mix, blocks_of, make_mix
from ldm.checkpoint.merge.origin import Source, origin_of
from ldm.checkpoint.original.single import Log
from ldm.checkpoint.parts import NETWORKS
from ldm.checkpoint.save import State, save_model
from ldm.checkpoint.source import as_given, find, find_part, load_parts
from ldm.errors import UserError


def merge(
    sources: Sequence[str | Path],
    target: Path,
    *,
    weights: Sequence[float] | None = None,
    add_difference: float | None = None,
    block_weights: BlockWeights | None = None,
    parts: Sequence[str] | None = None,
    vae: str | Path | None = None,
    dtype: torch.dtype | None = None,
    ema: bool | None = None,
    prediction_type: str | None = None,
    max_shard_size: str | None = None,
    force: bool = False,
    log: Log = print,
) -> None:
    """Write what `sources` become together to `target`: one file if that ends in .safetensors, or a folder.

    Configs, tokenizers, scheduler and defaults are those of the first, A. Each tensor is computed in fp32,
    rounded once and written before the next is read, so models of any size fit into memory.

    Args:
        sources: each a folder, a file, or a name on the hub.
        weights: of each, with a sum of 1; or of two models that of the second, M in `A (1 - M) + B M`. Equal
            shares without them.
        add_difference: M in `A + M (B - C)`.
        block_weights: of B, or M, in blocks of the U-Net: all in order, BASE first or left out, or by name.
        parts: "unet", "vae", "text_encoder", "text_encoder_2": those that are merged, others being A's.
            None: all that A has.
        vae: whence the VAE is taken as it is.
        dtype: of floating-point tensors; None keeps that of A.
        ema: of single files that hold both, the averaged weights (True) or the plain ones (False).
        prediction_type: "epsilon" or "v_prediction", of all models, where they do not say it or are wrong.
        max_shard_size, force, log: as in `convert`.

    Raises:
        UserError: naming the config key or tensor in which models differ, or what else is wrong. Nothing is
            half-written.
    """
    target = Path(target)
    if target.exists() and not force:
        raise UserError(f"{target}: is there already; choose another name, or replace it with --force")
    if len(sources) < 2:
        raise UserError("one model alone is no merge: give two or more")
    first = _open(sources[0], vae, ema, prediction_type, log)
    merged = _merged_parts(first, parts, vae)
    mix = make_mix(len(sources), weights, add_difference, block_weights, first.parts.unet.config)
    others = [_open(given, None, ema, prediction_type, log) for given in sources[1:]]
    check_alike(first, others, merged)
    for line in differences(first, others, merged):
        log(line)
    every = [first, *others]
    header = origin_of(mix, every, merged, dtype, None if vae is None else find_part(vae, "vae"))
    words = [each.parts.words for each in every]
    made = replace(first.parts, words=frozenset().union(*words) if all(words) else frozenset())
    states = {part: _state(part, every, mix, dtype) for part in merged}
    save_model(target, made, dtype, max_shard_size, states=states, header=header)


def _open(
    given: str | Path, vae: str | Path | None, ema: bool | None, prediction_type: str | None, log: Log
) -> Source:
    path = find(given)
    with as_given({path: given}) as in_their_words:
        parts = load_parts(
            path,
            None,
            vae=vae,
            ema=None if path.is_dir() else ema,
            prediction_type=prediction_type,
            log=lambda line: log(in_their_words(line)),
        )
    return Source(given, path, parts)


def _merged_parts(first: Source, asked: Sequence[str] | None, vae: str | Path | None) -> list[str]:
    """The networks that are merged. Raises UserError for one that there is not."""
    in_order = ("unet", *(part for part in NETWORKS if part != "unet"))  # it says most of what a model is
    there = [part for part in in_order if getattr(first.parts, part) is not None]
    if asked is None:
        return [part for part in there if part != "vae" or vae is None]
    wanted = [part.replace("-", "_") for part in asked]
    for part in wanted:
        if part not in NETWORKS:
            raise UserError(f"parts: {part!r} is none; choose of {', '.join(NETWORKS)}")
        if part not in there:
            raise UserError(f"{first.given}: has no {part} to merge")
    if not wanted:
        raise UserError(f"parts: none is given; choose of {', '.join(there)}")
    if vae is not None and "vae" in wanted:
        raise UserError("the VAE is either merged or taken from elsewhere: leave it out of the parts")
    return [part for part in there if part in wanted]


# --- the tensors -----------------------------------------------------------------------------------------


def _state(part: str, sources: Sequence[Source], mix: Mix, dtype: torch.dtype | None) -> State:
    """A part's merged tensors, by the names in A's module."""
    states = [getattr(source.parts, part).state_dict() for source in sources]
    blocks = blocks_of(sources[0].parts.unet.config, states[0]) if part == "unet" else {}
    merged = {}
    for name, like in states[0].items():
        block = blocks.get(name, BASE)
        wanted = dtype if dtype is not None and like.is_floating_point() else like.dtype
        make = partial(_make, [state[name] for state in states], mix, block, wanted, f"{part}: tensor {name}")
        merged[name] = Later(torch.empty_like(like, dtype=wanted, device="meta"), make)
    return merged


def _make(tensors: Sequence[Tensor], mix: Mix, block: str, dtype: torch.dtype, what: str) -> Tensor:
    """One merged tensor in `dtype`. Raises UserError if it does not hold its numbers."""
    first, *others = tensors
    if not first.is_floating_point():
        return first
    with torch.no_grad():
        if others[0].shape == first.shape:
            mixed = mix(tensors, block).to(dtype)
        else:  # A's input has more channels than that of the others, and keeps them
            shared, rest = first.tensor_split([others[0].shape[1]], dim=1)
            mixed = torch.cat([mix([shared, *others], block).to(dtype), rest.to(dtype)], dim=1)
    for tensor in tensors:
        let_go(tensor)
    if not is_finite(mixed):
        raise UserError(f"{what} is too large for {str(dtype)[6:]}: give another dtype, or smaller weights")
    return mixed
