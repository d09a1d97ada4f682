"""The page of docs/gallery.md: every prompt with the same seeds, whatever comes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm.images.pixels import contact_sheet
from ldm.pipeline import Pipeline

SEEDS = (0, 1, 2, 3)
PAGE = """# Gallery

{count} prompts written by hand, each drawn with the seeds {seeds}. None was picked, none left out:
`python scripts/draw_gallery.py` draws them again.

What can be done beside a prompt is drawn once each, with its command:
[from pictures, masks, noise](pictures.md), [more pixels](more_pixels.md), [marks in prompts](prompts.md),
[plots](outputs.md), [edits and classifiers](theory.md).

| Prompt | |
|---|---|
{rows}
"""


def draw_gallery(pipe: Pipeline, prompts: Sequence[str], out: Path) -> None:
    """Write `out`/gallery.md, and `out`/gallery/<number>.webp for each prompt: its pictures side by side."""
    folder = out / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, prompt in enumerate(prompts):
        name = f"{number:02}.webp"
        images = pipe([prompt] * len(SEEDS), seed=list(SEEDS)).images
        contact_sheet(images, columns=len(SEEDS)).save(folder / name, quality=92)
        rows.append(f"| {prompt} | ![{prompt}](gallery/{name}) |")
    page = PAGE.format(count=len(prompts), seeds=", ".join(map(str, SEEDS)), rows="\n".join(rows))
    (out / "gallery.md").write_text(page, encoding="utf-8")
