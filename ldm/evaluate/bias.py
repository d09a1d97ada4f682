"""What a model draws where a prompt leaves it open: shares of labels among many pictures of one prompt.

A judge gives each picture a label of each of its attributes: a user's classifier, a CLIP with texts to choose
from, or the embedded world's scorer. Shares have their Wilson intervals. What the judge confuses is in them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm.errors import UserError, reason
from ldm.evaluate.features import ImageTower, unit
from ldm.evaluate.report import Rate, rate
from ldm.files import whole_file
from ldm.images.opening import open_picture

FEW = 12  # labels: of more, those that were never seen are left out
AT_ONCE = 64  # pictures in memory
CLASSIFIER = "class"  # the one attribute of a classifier


@dataclass(frozen=True)
class Judge:
    """Pictures -> for each attribute a label of each; `labels` are all that it could say."""

    labels: Mapping[str, Sequence[str]]
    read: Callable[[Sequence[Image.Image]], Mapping[str, Sequence[str]]]
    protocol: Mapping[str, object]


@dataclass(frozen=True)
class Share:
    """How many pictures of a prompt have a label."""

    prompt: str
    attribute: str
    label: str
    rate: Rate


def shares(
    prompt: str, told: Mapping[str, Sequence[str]], labels: Mapping[str, Sequence[str]]
) -> Iterator[Share]:
    """Of each attribute its labels, the most frequent first; of few labels those that no picture has, too."""
    for attribute, seen in told.items():
        possible = [*dict.fromkeys([*labels[attribute], *seen])]
        counted = {label: seen.count(label) for label in possible}
        for label in sorted(possible, key=lambda each: -counted[each]):
            if counted[label] or len(possible) <= FEW:
                yield Share(prompt, attribute, label, rate(each == label for each in seen))


def probe(judge: Judge, drawn: Sequence[tuple[str, Sequence[Path]]]) -> list[Share]:
    """The shares of all prompts, each with its pictures."""
    found: list[Share] = []
    for prompt, paths in drawn:
        told: dict[str, list[str]] = {name: [] for name in judge.labels}
        for start in range(0, len(paths), AT_ONCE):
            read = judge.read([open_picture(path) for path in paths[start : start + AT_ONCE]])
            for name, labels in read.items():
                told[name] += labels
        found += shares(prompt, told, judge.labels)
    return found


# --- judges ----------------------------------------------------------------------------------------------


def by_clip(tower: ImageTower, texts: Mapping[str, Sequence[str]]) -> Judge:
    """Of each attribute the text that CLIP finds nearest, by the cosine of the embeddings."""

    def read(images: Sequence[Image.Image]) -> dict[str, list[str]]:
        pictures = tower.embed(images)
        found = {name: (pictures @ unit(tower.texts(own)).T).argmax(1) for name, own in texts.items()}
        return {name: [texts[name][k] for k in places] for name, places in found.items()}

    return Judge(texts, read, {"clip": tower.protocol(), "texts": {k: list(v) for k, v in texts.items()}})


def read_texts(path: Path) -> dict[str, list[str]]:
    """Texts to choose from, an attribute a line: `hair: dark hair | fair hair`. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read texts from {path}: {reason(error)}") from None
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, rest = line.partition(":")
        texts = [text.strip() for text in rest.split("|") if text.strip()]
        if not colon or len({*texts}) < 2 or name.strip() in found:
            raise UserError(
                f"{path}, line {number}: {line!r:.60} is no attribute: write `name: a text | another text`, "
                "each name once"
            )
        found[name.strip()] = texts
    if not found:
        raise UserError(f"no texts in {path}: write an attribute a line, `hair: dark hair | fair hair`")
    return found


def by_classifier(folder: Path, device: str | torch.device = "cpu") -> Judge:
    """The class that a transformers classifier of pictures gives the highest logit. Raises UserError."""
    import transformers

    try:
        model, info = transformers.AutoModelForImageClassification.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        processor = transformers.AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True
        )
    except Exception as error:  # safetensors, pickle and transformers have their own
        raise UserError(f"cannot read the classifier in {folder}: {reason(error)}") from None
    if absent := sorted(info["missing_keys"]):
        raise UserError(f"the classifier in {folder} lacks {absent[0]} and {len(absent) - 1} more tensors")
    model.eval().to(device)
    names = [str(model.config.id2label[k]) for k in range(model.config.num_labels)]

    @torch.inference_mode()
    def read(images: Sequence[Image.Image]) -> dict[str, list[str]]:
        told = []
        for image in images:  # one by one: they may differ in size
            pixels: Any = processor(images=image, return_tensors="pt")["pixel_values"]
            logits = model(pixel_values=pixels.to(device)).logits[0]
            if not logits.isfinite().all():
                raise UserError(f"the classifier in {folder} gives NaN or Inf: its weights are damaged")
            told.append(names[int(logits.argmax())])
        return {CLASSIFIER: told}

    return Judge({CLASSIFIER: names}, read, {"classifier": str(folder), "labels": names})


# --- told ------------------------------------------------------------------------------------------------


def table(found: Sequence[Share]) -> Iterator[str]:
    """Lines for a terminal: under each prompt and attribute its labels."""
    before = ("", "")
    width = max((len(each.label) for each in found), default=0)
    for each in found:
        if (each.prompt, each.attribute) != before:
            before = (each.prompt, each.attribute)
            yield f"{each.prompt!r}, {each.attribute} (of {each.rate.n}, 95 % Wilson intervals)"
        interval = f"[{each.rate.low:.3f}, {each.rate.high:.3f}]"
        yield f"  {each.label.ljust(width)}  {each.rate.share:.3f}  {interval}"


def write_bias(path: Path, found: Sequence[Share], protocol: Mapping[str, object]) -> None:
    """All shares with what they rest on, as JSON. Raises UserError where it cannot be written."""
    value = {
        "protocol": protocol,
        "shares": [{**asdict(each), "share": each.rate.share} for each in found],
    }
    with whole_file(path) as aside:
        aside.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
