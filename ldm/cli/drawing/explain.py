"""`txt2img --explain`: what the text encoders read of a prompt, in each step, window by window."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.pipeline import Job
    from ldm.prompts.text_encoder import Clip, Window


def explain(job: Job) -> Iterator[str]:
    """Lines of text, for each prompt of a job."""
    from ldm.pipeline.conditioning import texts_at

    steps = len(job.grid.timesteps)
    clips, grammar = job.model.text.clips, job.request.grammar
    for request in job.requests:
        yield f"prompt: {request.prompt or '(empty)'}"
        shares = request.scripts[0].shares
        for texts, same in groupby(range(steps), key=lambda step: texts_at(request, step, steps)):
            if any(script.changes for script in (*request.scripts[:2], *request.region_scripts)):
                span = list(same)
                yield f"steps {span[0] + 1} to {span[-1] + 1} of {steps}"
            for number, (clip, column) in enumerate(zip(clips, texts.columns, strict=False), start=1):
                if len(clips) > 1:
                    yield f" text encoder {number}"
                others = ["negative prompt", *("target prompt" for _ in texts.target)]
                others += [f"region {k + 1}" for k in range(len(texts.regions))]
                for k, text in enumerate(column):
                    if k < len(shares):
                        name = "prompt" if len(shares) == 1 else f"part {k + 1}, share {shares[k]:g}"
                    else:
                        name = others[k - len(shares)]
                    yield from _told(name, clip, clip.cut(text, grammar))


def _told(name: str, clip: Clip, windows: list[Window]) -> Iterator[str]:
    tokens, room = sum(len(window.ids) for window in windows), clip.window - 2
    plural = "" if len(windows) == 1 else "s"
    yield f"  {name}: {tokens} tokens in {len(windows)} window{plural} of {room}"
    for number, window in enumerate(windows, start=1):
        words = clip.tokenizer.convert_ids_to_tokens(list(window.ids))
        runs = groupby(zip(words, window.weights, strict=True), key=lambda pair: pair[1])
        parts = []
        for weight, run in runs:
            text = "".join(word.replace("</w>", " ") for word, _ in run).strip()
            parts.append(text if weight == 1 else f"[{text}] x {weight:.4g}")
        if parts:
            yield f"    {number}, {len(window.ids)} of {room}: {' '.join(parts)}"
