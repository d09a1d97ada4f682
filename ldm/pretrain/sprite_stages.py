"""The training of a model of the sprite world: autoencoder, text encoder, denoiser, the decoder again.

Each stage has its recipe (configs/sprites_<stage>.yaml) and its folder in the run's; the rendered pictures
and latents are in the run's `data`, and what they make together in `model`. The same call again goes on
where the last one stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ldm.errors import UserError
from ldm.files import whole_folder
from ldm.pretrain.postcard import assemble
from ldm.pretrain.recipe import Recipe, load_recipe
from ldm.train.loop import train
from ldm.train.task import Task

STAGES = ("vae", "clip", "unet", "decoder")


def train_all(
    configs: Path,
    run_dir: Path,
    old: Path | None,
    overrides: Mapping[str, list[str]],
    kept: Path | None = None,
) -> bool:
    """Train all stages in `run_dir`; whether the last has come to its end.

    Args:
        old: a model folder to begin from: its autoencoder's latents are kept, and the denoiser goes on.
        overrides: `section.key=value` for each stage.
        kept: a model folder, or a part of one: its autoencoder or text encoder are taken as they are.

    Raises:
        UserError: for a stage that there is not, or where there is nothing to keep.
    """
    run_dir = run_dir.resolve()  # a state knows where its data are
    for stage in overrides:
        if stage not in STAGES:
            raise UserError(f"{stage} is no stage: they are {', '.join(STAGES)}")
    if kept is not None:
        _keep(kept, run_dir)
    for stage in STAGES:
        recipe = load_recipe(
            configs / f"sprites_{stage}.yaml", [f"data.cache={run_dir / 'data'}", *overrides.get(stage, [])]
        )
        folder = run_dir / stage
        folder.mkdir(parents=True, exist_ok=True)
        ended = folder / "ended"  # or its task would be made only to see that nothing is left to do
        if ended.exists():
            continue
        print(f"{stage}: {folder}", flush=True)
        torch.manual_seed(recipe.run.seed)
        if not train(_TASKS[stage](recipe, run_dir, old), recipe, folder):
            return False
        ended.touch()
    if not (run_dir / "model").exists():
        assemble(run_dir)
    return True


# What a stage leaves in its `export`, by the names in a model folder, and where.
_MADE = {
    "vae": {"vae": "."},
    "clip": {name: name for name in ("text_encoder", "tokenizer", "words.txt", "world.json")},
}


def _keep(model: Path, run_dir: Path) -> None:
    """Take what a model folder has of the first stages as what they made."""
    had = [stage for stage, parts in _MADE.items() if all((model / name).exists() for name in parts)]
    if not had:
        told = " or ".join(" and ".join(parts) for parts in _MADE.values())
        raise UserError(f"{model} has nothing to keep: {told}")
    for stage in had:
        folder = run_dir / stage
        if (folder / "ended").exists():
            continue
        with whole_folder(folder / "export") as aside:
            for name, to in _MADE[stage].items():
                if (model / name).is_dir():
                    shutil.copytree(model / name, aside / to, dirs_exist_ok=True)
                else:
                    shutil.copy(model / name, aside / to)
        (folder / "ended").touch()


def _vae(recipe: Recipe, run_dir: Path, old: Path | None) -> Task:
    from ldm.pretrain.sprites import sprite_pictures
    from ldm.pretrain.vae import VAETask, build_vae, load_vae
    from ldm.pretrain.widen import widen_vae

    narrow = load_vae(old) if old else None
    vae = build_vae(recipe.model) if narrow is None else widen_vae(narrow, recipe.model["latent_channels"])
    return VAETask(vae, *sprite_pictures(recipe.data), recipe.loss, False, narrow)


def _clip(recipe: Recipe, run_dir: Path, old: Path | None) -> Task:
    from ldm.checkpoint import load_text_encoder, load_tokenizer
    from ldm.pretrain.naming import NamingTask, learn_vocabulary, new_text_encoder

    model, tokenizer = recipe.model, run_dir / "clip" / "tokenizer"
    if not tokenizer.exists():
        with whole_folder(tokenizer) as aside:
            learn_vocabulary(recipe.data, model["merges"], model["length"], aside)
    known = None
    if old:
        known = load_text_encoder(old / "text_encoder", torch.float32), load_tokenizer(old / "tokenizer")
    text = new_text_encoder(model["text_config"], load_tokenizer(tokenizer), known)
    return NamingTask(recipe.data, tokenizer, text, recipe.loss)


def _unet(recipe: Recipe, run_dir: Path, old: Path | None) -> Task:
    from ldm.checkpoint.parts import check_fit
    from ldm.pretrain.sprites import sprite_latents
    from ldm.pretrain.unet import UNetTask, make_parts

    vae, clip = run_dir / "vae" / "export", run_dir / "clip" / "export"
    parts = make_parts(recipe.model, vae, clip, old)
    check_fit(parts, {"unet": old or run_dir, "vae": vae, "text_encoder": clip})
    repainted = recipe.loss.get("repainted", 0) > 0
    seen, held_out = sprite_latents(recipe.data, parts.vae, parts.tokenizer, repainted)
    return UNetTask(parts, seen, held_out, recipe.loss, recipe.model["prompts"])


def _decoder(recipe: Recipe, run_dir: Path, old: Path | None) -> Task:
    from ldm.pretrain.sprites import sprite_pictures
    from ldm.pretrain.vae import VAETask, load_vae

    vae = load_vae(run_dir / "vae" / "export")
    return VAETask(vae, *sprite_pictures(recipe.data), recipe.loss, True)


_TASKS: dict[str, Callable[[Recipe, Path, Path | None], Task]] = {
    "vae": _vae,
    "clip": _clip,
    "unet": _unet,
    "decoder": _decoder,
}
