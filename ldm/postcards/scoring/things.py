"""How a model of the sprites' world follows its prompts, thing by thing and by what it had never seen."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

import numpy as np

from ldm.evaluate.report import Rate, rate
from ldm.postcards.scoring.following import following
from ldm.postcards.scoring.frozen import Frozen
from ldm.postcards.scoring.names import Names
from ldm.postcards.scoring.prompts import Prompt
from ldm.postcards.scoring.scorer import Reading
from ldm.postcards.sprites.scene import Unseen

HOLDS = 0.7  # of its prompts, and a model has learnt a thing


@dataclass
class Thing:
    """What became of the prompts that name a thing: whether it was there, and what was seen in its place."""

    outcomes: list[bool] = field(default_factory=list)
    seen_as: Counter[str] = field(default_factory=Counter)

    @property
    def rate(self) -> Rate:
        return rate(self.outcomes)

    @property
    def holds(self) -> bool:
        return self.rate.share >= HOLDS

    def row(self) -> dict[str, object]:
        """As JSON."""
        return {"right": self.rate.right, "n": self.rate.n, "seen as": dict(self.seen_as.most_common())}


def by_thing(prompts: Sequence[Prompt], read: Reading, names: Names) -> dict[str, Thing]:
    """Of each kind that prompts name. By itself it must be what is seen most surely, else be there at all."""
    found: dict[str, Thing] = defaultdict(Thing)
    for i, prompt in enumerate(prompts):
        surest = int(read.presence[i].argmax())
        alone = sum(named.count for named in prompt.objects) == 1
        for named in prompt.objects:
            k = names.kinds.index(named.kind)
            right = bool(read.count[i, k] > 0) and (surest == k or not alone)
            found[named.kind].outcomes.append(right)
            if alone and not right:
                found[named.kind].seen_as[names.kinds[surest]] += 1
    return dict(found)


def taken(read: Reading, chosen: Sequence[int]) -> Reading:
    """What was read in some of the pictures."""
    return Reading(*(value[list(chosen)] for value in vars(read).values()))


def joined(*parts: Reading) -> Reading:
    """What was read in the pictures of all parts."""
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Reading(*(np.concatenate(column) for column in columns))


def apart(frozen: Sequence[Frozen], read: Reading, names: Names) -> Iterator[tuple[str, dict[str, Rate]]]:
    """A column for each kind of combination that training never shows."""
    for unseen in get_args(Unseen):
        chosen = [i for i, each in enumerate(frozen) if each.unseen == unseen]
        if chosen:
            prompts = [frozen[i].prompt for i in chosen]
            yield f"held-out {unseen}", following(prompts, taken(read, chosen), names)


def told(things: Mapping[str, Thing]) -> str:
    """How many things hold, and of the others their shares, the least first, and what was seen instead."""
    holding = sum(each.holds for each in things.values())
    lines = [f"{holding} of {len(things)} things hold: {HOLDS:.0%} of their prompts right"]
    for noun, thing in sorted(things.items(), key=lambda item: (item[1].rate.share, item[0])):
        if not thing.holds:
            instead = ", ".join(name for name, _ in thing.seen_as.most_common(3))
            lines.append(f"{thing.rate.right} of {thing.rate.n}  {noun}{f'  ({instead})' if instead else ''}")
    return "\n".join(lines)
