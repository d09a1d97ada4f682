"""Preprocessors by name, as users of AUTOMATIC1111's ControlNet and of diffusers know them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ldm.errors import UserError
from ldm.preprocess import lines, surfaces
from ldm.preprocess.networks import Estimator
from ldm.preprocess.options import Option, declared, read
from ldm.preprocess.pictures import Levels, Picture, as_picture, grey
from ldm.spelling import squash, unknown


@dataclass(frozen=True)
class Preprocessor:
    """One way to make a control picture.

    Attributes:
        function: of a picture, of levels where `map`, and of a mask beside it where `masked`.
        also: other names of it.
        map: what it reads is a map [H, W]; colours count by their luminance.
        model: the kind of network that makes the map of a picture (`networks.CLASSES`).
        needs_model: without one there is nothing to do.
        masked: it takes a mask.
    """

    name: str
    function: Callable[..., Picture]
    also: tuple[str, ...] = ()
    map: bool = False
    model: str | None = None
    needs_model: bool = False
    masked: bool = False

    @cached_property
    def options(self) -> Mapping[str, Option]:
        return declared(self.function)

    @property
    def purpose(self) -> str:
        """In one line."""
        return (self.function.__doc__ or "").partition("\n")[0].rstrip(".:")


PREPROCESSORS: Mapping[str, Preprocessor] = {
    each.name: each
    for each in (
        Preprocessor("canny", lines.canny),
        Preprocessor("softedge", lines.softedge, ("soft_edge", "softedge_gradient")),
        Preprocessor("lineart", lines.lineart, ("lineart_dog", "lineart_standard")),
        Preprocessor("lineart_xdog", lines.lineart_xdog),
        Preprocessor("scribble_xdog", lines.scribble_xdog, ("scribble",)),
        Preprocessor("tile_resample", surfaces.tile_resample, ("tile",)),
        Preprocessor("blur_gaussian", surfaces.blur_gaussian, ("blur",)),
        Preprocessor("color", surfaces.color, ("colour", "t2ia_color_grid")),
        Preprocessor("invert", surfaces.invert),
        Preprocessor("inpaint", surfaces.inpaint, ("inpaint_only", "inpaint_global_harmonious"), masked=True),
        Preprocessor("depth", surfaces.depth, map=True, model="depth"),
        Preprocessor("normal", surfaces.normal, ("normal_map",), map=True, model="depth"),
        Preprocessor(
            "seg", surfaces.seg, ("segmentation",), map=True, model="segmentation", needs_model=True
        ),
    )
}
_NAMES = {squash(name): each for each in PREPROCESSORS.values() for name in (each.name, *each.also)}
# Preprocessors of networks that are not here, and what comes nearest.
_WITH_WEIGHTS = {
    **dict.fromkeys(("softedge_hed", "softedge_hedsafe", "hed"), "softedge, by gradients"),
    **dict.fromkeys(("softedge_pidinet", "softedge_pidisafe", "pidinet"), "softedge, by gradients"),
    **dict.fromkeys(("softedge_teed", "softedge_anyline", "mlsd"), "softedge or canny"),
    **dict.fromkeys(("lineart_realistic", "lineart_coarse", "lineart_anime"), "lineart or lineart_xdog"),
    **dict.fromkeys(("scribble_hed", "scribble_pidinet"), "scribble_xdog"),
    **dict.fromkeys(
        ("depth_midas", "depth_leres", "depth_zoe", "depth_anything"), "depth with --depth-model"
    ),
    **dict.fromkeys(("normal_bae", "normal_midas", "normal_dsine"), "normal with --depth-model"),
    **dict.fromkeys(("seg_ofade20k", "seg_ufade20k", "seg_ofcoco"), "seg with --segmentation-model"),
}
_ELSEWHERE = {squash(name): instead for name, instead in _WITH_WEIGHTS.items()}
_POSES = ("openpose", "dwpose", "animalpose", "pose")


def find(name: str) -> Preprocessor:
    """A preprocessor in any spelling. Raises UserError, which says what comes near to one of a network."""
    found = _NAMES.get(squash(name))
    if found is not None:
        return found
    if squash(name) in _ELSEWHERE:
        raise UserError(f"{name} needs weights that do not come with ldm: take {_ELSEWHERE[squash(name)]}")
    if squash(name).startswith(_POSES):
        raise UserError(f"{name} needs weights that do not come with ldm: give a finished pose as a picture")
    raise unknown("preprocessor", name, PREPROCESSORS)


def read_options(name: str, given: Mapping[str, object]) -> dict[str, Any]:
    """Options of a preprocessor, numbers or their texts, checked. Raises UserError that names bounds."""
    found = find(name)
    return read(found.name, found.options, given)


def preprocess(
    picture: Picture | Levels,
    name: str,
    *,
    mask: Levels | None = None,
    estimator: Estimator | None = None,
    **options: Any,
) -> Picture:
    """The control picture of a picture: uint8 [H, W, 3] -> uint8 [H, W, 3], of `inpaint` [H, W, 4].

    Args:
        picture: for `depth` and `normal` also a map, float32 [H, W] of any range (`to_levels`).
        name: one of PREPROCESSORS, in any spelling.
        mask: of `inpaint`: [H, W] in 0..1, 1 where it is drawn anew.
        estimator: a network of `load_estimator`, which makes the map of a picture.
        options: of that preprocessor; the others have its defaults.

    Raises:
        UserError: for an unknown name or option, one beyond its bounds, and arrays of other shapes.
    """
    found = find(name)
    checked = read(found.name, found.options, options)
    if found.masked and mask is None:
        raise UserError(f"{found.name} needs a mask: what is drawn anew")
    if found.needs_model and estimator is None:
        raise UserError(f"{found.name} needs a network: --{found.model}-model FOLDER")
    source = picture
    if not found.map or estimator is not None or picture.ndim != 2:
        source = as_picture(picture)
        if found.map:
            source = grey(source) if estimator is None else estimator(source)
    return found.function(source, *([mask] if found.masked else []), **checked)
