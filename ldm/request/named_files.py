"""The files that a request names: whoever takes one from a stranger's picture looks at them first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import UserError
from ldm.files import is_remote
from ldm.request.request import Request


@dataclass(frozen=True)
class Named:
    """A file or folder that a request names, by what of a request it is."""

    field: str
    path: str
    is_network: bool  # which would be looked for on the hub where it is no file


def passes_of(request: Request) -> tuple[Request, ...]:
    """A request and those within it."""
    nested = (request.hires, request.refining, request.upscaling)
    return (request, *(each for each in nested if each is not None))


def files_named(request: Request) -> Iterator[Named]:
    """All but its own picture, mask and upscaler, in all of its passes."""
    for each in passes_of(request):
        for control in each.control or ():
            yield from _named("control", (control.model,), (control.image, control.mask))
        for use in each.image_prompts or ():
            yield from _named("image_prompts", (use.adapter, use.image_encoder), (*use.images, *use.masks))
        for region in each.regions or ():
            yield from _named("regions", (), (region.mask,))
        if each.guidance is not None:
            from ldm.diffusion.guidances.catalogue import models_in  # which needs torch

            yield from _named("guidance", models_in(each.guidance), ())


def _named(field: str, networks: tuple[str | None, ...], pictures: tuple[str | None, ...]) -> Iterator[Named]:
    for paths, is_network in ((networks, True), (pictures, False)):
        yield from (Named(field, path, is_network) for path in paths if path is not None)


def check_here(request: Request, file: Path, given: tuple[str, ...] = ()) -> None:
    """Raise UserError where the request of the picture `file` names what does not lie on this computer.

    A stranger may have written it: nothing is fetched for its word, and no other computer is asked, which
    would tell who looks.

    Args:
        given: fields in whose place others were given.
    """
    for each in files_named(request):
        absent = each.is_network and not Path(each.path).expanduser().exists()
        if each.field not in given and (absent or is_remote(each.path)):
            raise UserError(
                f"{file} names {each.path!r} ({each.field}), which is not here, and nothing is fetched for a "
                f"picture's word: put it there, or give another by --{FLAGS.get(each.field, each.field)}"
            )


FLAGS = {"image_prompts": "image-prompt", "regions": "region"}
