"""The training of a model of the sprite world: autoencoder, text encoder, denoiser, one after the other.

Each stage has its recipe (configs/sprites_<stage>.yaml) and its folder in the run's; the rendered pictures
and latents are in the run's `data`. The same call again goes on where the last one stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

from ldm.errors import UserError
from ldm.files import whole_folder
from ldm.pretrain.recipe import Recipe, load_recipe
from ldm.train.loop import train
from ldm.train.task import Task

STAGES = ("vae", "clip", "unet")


def train_all(
    configs: Path,
    run_dir: Path,
    old: Path | None,
    overrides: Mapping[str, list[str]],
    kept: Collection[str] = (),
) -> bool:
    """Train all stages in `run_dir`; whether the last has come to its end.

    Args:
        old: a model folder to begin from: its autoencoder's latents are kept, and the denoiser goes on.
        overrides: `section.key=value` for each stage.
        kept: stages that are not trained, but taken from `old` as they are: vae, clip.

    Raises:
        UserError: for a stage that there is not, or that cannot be kept.
    """
    run_dir = run_dir.resolve()  # a state knows where its data are
    for stage in overrides:
        if stage not in STAGES:
            raise UserError(f"{stage} is no stage: they are {', '.join(STAGES)}")
    for stage in kept:
        if old is None or stage not in _MADE:
            raise UserError(f"{stage} cannot be kept: {', '.join(_MADE)} of a model folder can")
        _keep(stage, old, run_dir / stage)
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
    return True


# What a stage leaves in its `export`, by the names in a model folder, and where.
_MADE = {
    "vae": {"vae": "."},
    "clip": {name: name for name in ("text_encoder", "tokenizer", "words.txt", "world.json")},
}


def _keep(stage: str, old: Path, folder: Path) -> None:
    if (folder / "ended").exists():
        return
    for name in _MADE[stage]:
        if not (old / name).exists():
            raise UserError(f"{old} has no {name}: {stage} cannot be kept")
    folder.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder / "export") as aside:
        for name, to in _MADE[stage].items():
            if (old / name).is_dir():
                shutil.copytree(old / name, aside / to, dirs_exist_ok=True)
            else:
                shutil.copy(old / name, aside / to)
    (folder / "ended").touch()


def _vae(recipe: Recipe, run_dir: Path, old: Path | None) -> Task:
    from ldm.pretrain.sprites import sprite_pictures
    from ldm.pretrain.vae import VAETask, build_vae, load_vae
    from ldm.pretrain.widen import grown_vae

    narrow = load_vae(old) if old else None
    vae = build_vae(recipe.model) if narrow is None else grown_vae(narrow, recipe.model)
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


_TASKS: dict[str, Callable[[Recipe, Path, Path | None], Task]] = {"vae": _vae, "clip": _clip, "unet": _unet}
