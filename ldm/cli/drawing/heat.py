"""`txt2img --attention-maps FOLDER`: sheets of which places of a picture each word of its prompt drew."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ldm.cli.provenance import marks
from ldm.cli.terminal import echo

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.pipeline import Job
    from ldm.pipeline.job import Batch


class HeatMaps:
    """Draws batches with a sheet for each picture. Raises UserError for jobs that have no such maps."""

    def __init__(self, args: argparse.Namespace, jobs: Sequence[Job]) -> None:
        from ldm.files import check_writable
        from ldm.images.provenance import TRAINED
        from ldm.pipeline.steering.maps import check

        for job in jobs:
            check(job)
        check_writable(args.attention_maps)
        self.args, self.marks = args, replace(marks(args), source=TRAINED)

    def draw(
        self, job: Job, batch: Batch, draw: Callable[[Job, Batch], tuple[list[Image], Batch]]
    ) -> tuple[list[Image], Batch]:
        """The pictures of a batch, as `draw` draws them, and what it tells of them."""
        from ldm.images.png import save_numbered
        from ldm.pipeline.steering.maps import record

        made, folder = record(job, batch, draw), self.args.attention_maps
        for sheet, picture in zip(made.sheets(), batch, strict=True):
            path = save_numbered(sheet, folder, "words-%05d.png", None, marks=self.marks)
            echo(self.args, f"{path}  words of seed {picture.seed}")
        return list(made.images), made.batch
