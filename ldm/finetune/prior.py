"""Prior preservation: pictures of the class, drawn by the model itself before it is trained.

DreamBooth (Ruiz et al. 2023, arXiv 2208.12242, section 3.3) trains beside the pictures of "a sks dog" on the
model's own of "a dog", so that it forgets neither what dogs look like nor how they differ (eq. 2).

    the user's pictures + what earlier runs drew -> numbers that are missing -> drawn-00000.png, ...
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from ldm.dataset.examine import examine
from ldm.dataset.findings import Example
from ldm.errors import UserError
from ldm.files import check_writable
from ldm.images.png import read_request, save_png
from ldm.models.kind import Kind
from ldm.pipeline import Pipeline
from ldm.pipeline.inputs import NOTHING, Inputs
from ldm.request import Request

NAME, NUMBER = "drawn-{:05d}.png", re.compile(r"drawn-(\d{5,})\.png")
MOST_AT_ONCE = 8  # pictures in a batch, so that little is lost where drawing is stopped

Progress = Callable[[int, int], object]  # pictures done, pictures in all: of this process


def draw_class(
    load: Callable[[], Pipeline],
    prompts: Sequence[str],
    folder: Path,
    count: int,
    *,
    size: int,
    share: tuple[int, int] = (0, 1),
    on_progress: Progress | None = None,
) -> None:
    """Draw what `folder` lacks of `count` pictures of a class; what lies there counts and is never changed.

    Picture k is `drawn-<k>.png`, of seed k and of the prompts' k-th, over and over: drawing that is stopped
    goes on, and several processes make the same set as one, up to rounding. They must wait for each other
    before the folder is read.

    Args:
        prompts: one, or several where the class is wide, such as all that the model should not forget.
        load: gives the model that is to be fine-tuned; called once, where something is drawn or was before.
        size: pixels of each side.
        share: (rank, processes): this process draws the numbers k with k % processes == rank.
        on_progress: called after each batch.

    Raises:
        UserError: if the folder cannot be written to, or holds what was drawn for another prompt or model.
    """
    folder, (rank, processes) = Path(folder), share
    drawn = {number: path for path in folder.glob("drawn-*.png") if (number := _number(path)) >= 0}
    wanted = range(count - _given(folder, count))
    missing = [k for k in wanted if k not in drawn and k % processes == rank]
    if not missing and not drawn:
        return
    pipe, request = load(), Request(prompt="", height=size, width=size)
    for k, path in sorted(drawn.items()):
        _check(path, request.replace(prompt=prompts[k % len(prompts)]), pipe)
    check_writable(folder)
    inputs, at_once = (
        _inputs(pipe, size),
        min(MOST_AT_ONCE, pipe.runtime.images_at_once(size, size, pipe.bytes_per_pixel)),
    )
    for start in range(0, len(missing), at_once):
        numbers = missing[start : start + at_once]
        requests = [request.replace(prompt=prompts[k % len(prompts)], seeds=(k,)) for k in numbers]
        result = pipe.generate(requests, inputs=inputs)
        for k, image, drawn_by in zip(numbers, result.images, result.requests, strict=True):
            save_png(image, folder / NAME.format(k), drawn_by)
        if on_progress is not None:
            on_progress(start + len(numbers), len(missing))


def class_examples(folder: Path, prompts: Sequence[str]) -> tuple[Example, ...]:
    """The pictures of the class to train on, captioned as they were drawn, others by the first prompt.

    Raises UserError if there are none.
    """
    examples = examine(folder, instance_prompt=prompts[0]).examples
    if not examples:
        raise UserError(f"{folder} holds no picture of the class that can be read: see `ldm folder {folder}`")
    numbers = [max(0, _number(each.path)) for each in examples]
    return tuple(
        replace(each, caption=prompts[k % len(prompts)]) for each, k in zip(examples, numbers, strict=True)
    )


def _given(folder: Path, count: int) -> int:
    """Pictures that can be trained on whose number is none of 0 .. count - 1: the same for all processes."""
    examples = examine(folder, instance_prompt="").examples if folder.is_dir() else ()
    return sum(each.path.parent != folder or _number(each.path) not in range(count) for each in examples)


def _number(path: Path) -> int:
    """Of a picture that was drawn here; -1 for others."""
    match = NUMBER.fullmatch(path.name)
    return int(match[1]) if match else -1


def _check(path: Path, request: Request, pipe: Pipeline) -> None:
    """Raise UserError unless `path` was drawn for this prompt, in this size, by this model."""
    try:
        was = read_request(path)
    except UserError as error:
        raise UserError(f"{error}: delete it, or give it another name") from None
    both_hashed = was.model_hash and pipe.model_hash  # parts made in memory have only a name
    same_model = was.model_hash == pipe.model_hash if both_hashed else was.model == pipe.name
    if was.prompt != request.prompt:
        difference = f"for the prompt {was.prompt!r} and not {request.prompt!r}"
    elif (was.width, was.height) != (request.width, request.height):
        difference = f"at {was.width} x {was.height} pixels and not {request.width} x {request.height}"
    elif not same_model:
        difference = f"by {was.model} ({was.model_hash}) and not {pipe.name} ({pipe.model_hash})"
    else:
        return
    raise UserError(f"{path} was drawn {difference}: delete drawn-*.png there, or choose another folder")


def _inputs(pipe: Pipeline, size: int) -> Inputs:
    """An inpainting model draws a whole picture where the mask is white everywhere."""
    if pipe.kind is not Kind.INPAINT:
        return NOTHING
    return Inputs(image=Image.new("RGB", (size, size)), mask_image=Image.new("L", (size, size), 255))
