"""Models and adapters by name on the Hugging Face hub: only the files that are read, once, into its cache."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from ldm.checkpoint.folder import CLASSES
from ldm.checkpoint.parts import STEMS, TEXT_STEM
from ldm.checkpoint.weights import choose_weights
from ldm.errors import UserError, abbreviate
from ldm.files import whole_file
from ldm.prompts.world import TABLE

PIPELINE_FILES = ("model_index.json", "ldm.json", "words.txt", TABLE)
MODEL_CONFIGS = ("model_index.json", "config.json")
# What diffusers and peft call adapters.
ADAPTER_FILES = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "learned_embeds.safetensors",
    "pytorch_lora_weights.bin",
    "learned_embeds.bin",
)
IMAGE_ENCODER = "image_encoder"  # the folder beside IP-Adapters
ENCODER_FILES = ("config.json", "preprocessor_config.json")
CONFIG_FILES = ("config.json", "scheduler_config.json")
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def fetch(
    name: str, revision: str | None = None, variant: str | None = None, part: str | None = None
) -> Path:
    """The folder in the cache with a model, or with one part of it, fetched where it is not there yet.

    Args:
        name: "owner/model".
        revision: a branch, tag or commit; None is the main branch.
        variant: of the weights, such as "fp16".
        part: "unet", "vae", ...: fetch only this, of a pipeline or of a repository that holds nothing else.

    Raises:
        UserError: in one line, how to get the model where the hub does not give it.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(name, revision=revision)
        wanted = needed_files([file.rfilename for file in info.siblings or ()], name, variant, part)
        # All of one commit, the one whose files were listed, whatever is pushed meanwhile.
        path = Path(snapshot_download(name, revision=info.sha or revision, allow_patterns=wanted))
        _remember(path, revision)
        return path
    except UserError:
        raise
    except Exception as error:  # what the hub refuses, and whatever a broken network raises
        if (reason := _refused(error, name, revision)) is not None:
            raise UserError(f"{name}: no such folder or file here, and {reason}") from None
        return _cached(name, revision, error)


def _remember(snapshot: Path, revision: str | None) -> None:
    """Note in the cache which commit a branch or tag was, as huggingface_hub does: it is found by that later.

    snapshot: .../models--owner--model/snapshots/<commit>. Where it cannot be noted, only that is lost.
    """
    ref = snapshot.parents[1] / "refs" / (revision or "main")
    with contextlib.suppress(UserError, OSError):
        if revision != snapshot.name and not (
            ref.is_file() and ref.read_text(encoding="utf-8") == snapshot.name
        ):
            with whole_file(ref) as aside:
                aside.write_text(snapshot.name, encoding="utf-8")


def fetch_adapter(name: str, weight_name: str | None = None, encoder: bool = False) -> Path:
    """The file of an adapter or textual inversion in the cache, fetched where it is not there yet.

    Args:
        name: "owner/model".
        weight_name: of several files the one that is meant.
        encoder: whether the image encoder beside it is fetched too, as IP-Adapters need it.

    Raises:
        UserError: in one line, how to get it where the hub does not give it, or what to choose from.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = [file.rfilename for file in HfApi().model_info(name).siblings or ()]
        wanted = adapter_file(files, name, weight_name)
        beside = [*encoder_files(files, wanted)] if encoder else ["adapter_config.json"]
        return Path(snapshot_download(name, allow_patterns=[wanted, *beside])) / wanted
    except UserError:
        raise
    except Exception as error:
        if (reason := _refused(error, name, None)) is not None:
            raise UserError(f"{name}: no such file here, and {reason}") from None
        folder = _cached(name, None, error, ("adapter_config.json",))
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return folder / adapter_file(files, name, weight_name)


def adapter_file(files: Iterable[str], name: str, weight_name: str | None = None) -> str:
    """Which of a repository's files holds its adapter. Raises UserError where that is not plain."""
    weights = sorted(
        file
        for file in files
        if file.endswith((".safetensors", ".bin", ".pt")) and PurePosixPath(file).parent.name != IMAGE_ENCODER
    )
    if weight_name is not None:
        if weight_name in weights:
            return weight_name
        raise UserError(f"{name}: has no {weight_name}; it has {abbreviate(weights) or 'no weights'}")
    usual = [file for file in ADAPTER_FILES if file in weights]
    safe = [file for file in weights if file.endswith(".safetensors")]
    for found in (usual[:1], safe, weights):
        if len(found) == 1:
            return found[0]
    if not weights:
        raise UserError(f"{name}: has no weights of an adapter")
    raise UserError(f"{name}: has {abbreviate(weights)}: choose one by weight_name=")


def encoder_files(files: Iterable[str], wanted: str) -> list[str]:
    """The files that are read of the image encoder beside an adapter's; none where there is no encoder."""
    folder = PurePosixPath(wanted).parent / IMAGE_ENCODER
    names = {path.name for file in files if (path := PurePosixPath(file)).parent == folder}
    if "config.json" not in names:
        return []
    weights = choose_weights(names, folder, TEXT_STEM)
    read = {weights, *_shards(weights, names), *names.intersection(ENCODER_FILES)}
    return sorted(str(folder / name) for name in read)


def _cached(
    name: str, revision: str | None, error: Exception, patterns: Iterable[str] = MODEL_CONFIGS
) -> Path:
    """What an earlier download has left, without network. Its reader names files that it lacks."""
    from huggingface_hub import snapshot_download

    try:
        # The pattern keeps huggingface_hub from asking for the files that were never wanted.
        return Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=True,
                allow_patterns=list(patterns),
            )
        )
    except Exception:
        at = f" --revision {revision}" if revision else ""
        raise UserError(
            f"{name}: no such folder or file here, and the hub cannot be reached ({type(error).__name__}).\n"
            f"With a network, `hf download {name}{at}` gets it; or give the path of a folder that holds it."
        ) from None


def _refused(error: Exception, name: str, revision: str | None) -> str | None:
    """What the hub has against it, if it was the hub that answered."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{name}"
    match error:
        case errors.GatedRepoError():
            return f"the hub wants its terms accepted: do so at {page}, then run `hf auth login`"
        case errors.RevisionNotFoundError():
            return f"it has no revision {revision!r} on the hub: see {page}/branches"
        case errors.RepositoryNotFoundError():
            return "the hub has none of that name, or a private one: check it, or run `hf auth login`"
        case errors.HFValidationError():
            return "it is not a name that the hub can have (owner/model)"
        case _:
            return None


def needed_files(
    files: Iterable[str], name: str, variant: str | None = None, part: str | None = None
) -> list[str]:
    """The files of a repository that are read: chosen as in a folder, nothing twice, nothing to run.

    Raises:
        UserError: if it holds no pipeline (or, with `part`, no such part), or not the weights asked for.
    """
    folders: dict[str, set[str]] = {}
    for file in files:
        path = PurePosixPath(file)
        folders.setdefault("" if str(path.parent) == "." else str(path.parent), set()).add(path.name)
    top = folders.get("", set())
    if part is not None and "model_index.json" not in top and "config.json" in top:
        return _part_files(top, name, "", part, variant)
    if "model_index.json" not in top:
        single = sorted(file for file in top if file.lower().endswith((".safetensors", ".ckpt")))
        get = f": `hf download {name} {single[0]}`, and give the file's path" if single else ""
        raise UserError(f"{name}: not a diffusers pipeline (no model_index.json){get}")
    if part is not None and part not in folders:
        raise UserError(f"{name}: a pipeline without {part}")
    wanted = sorted(top.intersection(PIPELINE_FILES))
    for each in CLASSES if part is None else (part,):
        if each in folders:
            wanted += _part_files(folders[each], name, f"{each}/", each, variant)
    return wanted


def _part_files(names: set[str], name: str, prefix: str, part: str, variant: str | None) -> list[str]:
    """The files of one part, with the folder before them."""
    wanted = names.intersection((*CONFIG_FILES, *TOKENIZER_FILES))
    if part in STEMS:
        folder = PurePosixPath(name, part) if prefix else PurePosixPath(name)  # as the hub writes it
        weights = choose_weights(names, folder, STEMS[part], variant, needed=part == "unet")
        wanted |= {weights, *_shards(weights, names)}
    return sorted(prefix + file for file in wanted)


def _shards(index: str, names: Iterable[str]) -> set[str]:
    """The files that an index stands for: model.fp16-00001-of-00002.safetensors, ..."""
    match: Any = re.fullmatch(r"(\w+)\.(safetensors|bin)\.index(\.\w+)?\.json", index)
    if match is None:
        return set()
    stem, kind, variant = match.groups()
    shard = re.compile(rf"{stem}{re.escape(variant or '')}-\d+-of-\d+\.{kind}")
    return {name for name in names if shard.fullmatch(name)}
