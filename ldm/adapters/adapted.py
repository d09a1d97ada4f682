"""Adapters give new parts that share the tensors of the old ones; nothing is scaled or replaced in place."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.adapters.image_prompt import ImagePromptFile
from ldm.adapters.inversion import Embedding, add_words
from ldm.adapters.layers import Weighted, adapt_module
from ldm.adapters.lora import SUFFIXES, Lora, Report, match, name_of, read_lora
from ldm.adapters.names import ENCODERS, UNET
from ldm.checkpoint import Parts
from ldm.errors import UserError
from ldm.files import check_drawn_with
from ldm.request import EmbeddingUse, LoraUse, Request


@dataclass(frozen=True, eq=False)
class Adapted:
    """What a pipeline's parts were made of."""

    original: Parts | None = None  # before any adapter; None: there is none
    loras: tuple[Lora, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    image_prompts: tuple[ImagePromptFile, ...] = ()  # beside the parts, which they leave alone
    fused: bool = False
    reports: tuple[Report, ...] = ()  # one per LoRA

    @property
    def uses(self) -> tuple[LoraUse, ...]:
        """As requests name them."""
        return tuple(use_of(lora) for lora in self.loras)


def adapt(original: Parts, adapted: Adapted) -> tuple[Parts, Adapted]:
    """`original` with the adapters that `adapted` names.

    Raises:
        UserError: if one does not belong to this model; the message says which and why.
    """
    changes: dict[str, dict[str, list[Weighted]]] = {}
    reports = []
    for lora in adapted.loras:
        deltas, report = match(lora, original)
        reports.append(report)
        for (part, path), delta in deltas.items():
            weight = lora.weight if part == UNET else lora.text_weight
            if weight:
                changes.setdefault(part, {}).setdefault(path, []).append((delta, weight))
    modules: dict[str, Any] = {
        part: adapt_module(getattr(original, part), changes[part], adapted.fused)
        for part in (UNET, *ENCODERS)
        if part in changes
    }
    # Words come last: they make a table of tokens longer, which a difference may change.
    bundled = [word for lora in adapted.loras for word in lora.file.words]
    parts = add_words(replace(original, **modules), (*bundled, *adapted.embeddings))
    return parts, replace(adapted, original=original, reports=tuple(reports))


# --- as requests name them -------------------------------------------------------------------------------


def use_of(lora: Lora) -> LoraUse:
    return LoraUse(name=lora.name, weight=lora.weight, text_weight=lora.text_weight, sha256=lora.file.sha256)


def wanted_loras(request: Request, held: Sequence[Lora], folder: Path) -> tuple[Lora, ...]:
    """A pipeline's own adapters with those of a request, whose weights count; found in `folder` by name.

    Raises:
        UserError: for a name that is not there, and for a file that is not the one that was drawn with.
    """
    loras = {lora.name: lora for lora in held}
    for use in request.loras or ():
        known = loras.get(use.name)
        file = read_lora(find_lora(use.name, folder)) if known is None else known.file
        check_drawn_with(file.path, "file", file.sha256, use.sha256, "--lora")
        both = use.weight if use.text_weight is None else use.text_weight
        loras[use.name] = Lora(file, use.name, use.weight, both)
    return tuple(loras.values())


def used_embeddings(request: Request, held: Sequence[Embedding]) -> tuple[EmbeddingUse, ...]:
    """Those whose word occurs in the request. Raises UserError if it was drawn with one that is not held."""
    for use in request.embeddings or ():
        found = next((each for each in held if each.name == use.name), None)
        if found is None or found.sha256 != use.sha256:
            fault = "is not given" if found is None else f"is not the file {found.path}"
            raise UserError(
                f"the textual inversion {use.name} ({use.sha256[:10]}...) that this picture was drawn with "
                f"{fault}: give it by --embedding {use.name}=FILE"
            )
    texts = [*itertools.chain(*request.texts), *(region.prompt for region in request.regions or ())]
    words = "\n".join(texts).lower()
    return tuple(
        EmbeddingUse(name=each.name, sha256=each.sha256) for each in held if each.name.lower() in words
    )


def find_lora(name: str, folder: Path) -> Path:
    """The adapter of that name in `folder` or below. Raises UserError if there is none, or more than one."""
    # Names come from prompts and pictures: they are compared with what is there, never joined to a path.
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES and name_of(path) == name
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"the LoRA {name} could be {found[0]} or {found[1]}: rename one")
    raise UserError(
        f"no LoRA {name} in {folder}{'' if folder.is_dir() else ', which is no folder'}: "
        "give it by --lora FILE, or its folder by --lora-dir"
    )
