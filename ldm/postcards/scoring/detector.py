"""The detector: finds things one by one, then looks at each enlarged, and so tells hundreds apart.

Like the scorer it learns from renders and their exact labels only. The scorer has a query for each kind,
which must learn it in every place and size. Here one map says where anything is at all (Zhou et al. 2019,
"Objects as Points"), and a second network names a square cut of the picture around each thing (Girshick et
al. 2014, "Rich feature hierarchies"): always in the middle and of one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.postcards.scoring.names import Names
from ldm.postcards.scoring.scorer import MAX_COUNT, Descent, Instrument, Reading, RMSNorm, Trunk, as_array
from ldm.runtime import memory_format

CUT = 32  # pixels of a thing, enlarged or made smaller
_MARGIN = 1.15  # a cut's side in units of the thing's longer side
_THERE = 0.35  # least certainty of a thing
_MOST = 8  # things that are looked at in a picture


@dataclass(frozen=True)
class DetectorConfig(Names):
    """Names, the trunk's widths as a scorer's, and those of the look at a cut: at 1/2 to 1/16 of it."""

    widths: tuple[int, int, int, int] = (24, 32, 72, 96)
    look: tuple[int, int, int, int] = (32, 64, 128, 192)
    hidden: int = 256


@dataclass(frozen=True)
class Located:
    """What B pictures are as wholes: logits, and boxes as distances in units of the picture."""

    heat: Tensor  # [B, 16, 16]: is the middle of a thing here?
    sides: Tensor  # [B, 4, 16, 16]: from the cell's middle to the box's left, top, right, bottom
    place: Tensor  # [B, places]
    time: Tensor
    weather: Tensor
    features: Tensor  # [B, 2 D]: the map's mean and maximum


@dataclass(frozen=True)
class Named:
    """What N cuts show: logits, and what they are made of."""

    kind: Tensor  # [N, K + 1]: the last is nothing that has a name
    style: Tensor  # [N, styles]
    colour: Tensor  # [N, colours]
    features: Tensor  # [N, hidden]


class Look(Descent):
    """Cuts [N, 3, 32, 32] to features [N, hidden]."""

    def __init__(self, widths: Sequence[int], hidden: int) -> None:
        super().__init__(widths)
        self.norm = RMSNorm(widths[-1])
        self.out = nn.Linear(widths[-1] * 4, hidden)

    def forward(self, x: Tensor) -> Tensor:
        _, x = self.descend(x)
        return F.relu(self.out(F.relu(self.norm(x)).flatten(1)))


class Detector(Instrument):
    """Names things, styles, counts, colours, places in the picture, and scenery, of 128 x 128 pictures."""

    config: DetectorConfig
    config_class = DetectorConfig

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__(config)
        dim = config.widths[2]
        self.trunk = Trunk(config.widths)
        self.heat = nn.Linear(dim, 1)
        nn.init.constant_(self.heat.bias, -4.0)  # next to nothing is there at first
        self.sides = nn.Linear(dim, 4)
        self.scene = nn.Linear(2 * dim, config.hidden)
        self.place = nn.Linear(config.hidden, len(config.places))
        self.time = nn.Linear(config.hidden, len(config.times))
        self.weather = nn.Linear(config.hidden, len(config.weathers))
        self.look = Look(config.look, config.hidden)
        self.kind = nn.Linear(config.hidden, len(config.kinds) + 1)
        self.style = nn.Linear(config.hidden, len(config.styles))
        self.colour = nn.Linear(config.hidden, len(config.colours))

    def locate(self, images: Tensor) -> Located:
        """images: [B, 3, 128, 128] in [-1, 1]."""
        images = images.contiguous(memory_format=memory_format(images.device))
        tokens = self.trunk(images).permute(0, 2, 3, 1)  # [B, 16, 16, D]
        features = torch.cat([tokens.mean((1, 2)), tokens.amax((1, 2))], dim=1)
        scene = F.relu(self.scene(features))
        return Located(
            heat=self.heat(tokens)[..., 0],
            sides=F.softplus(self.sides(tokens)).permute(0, 3, 1, 2),
            place=self.place(scene),
            time=self.time(scene),
            weather=self.weather(scene),
            features=features,
        )

    def name(self, cut: Tensor) -> Named:
        """cut: [N, 3, 32, 32] in [-1, 1], as `cuts` makes them."""
        features = self.look(cut.contiguous(memory_format=memory_format(cut.device)))
        return Named(self.kind(features), self.style(features), self.colour(features), features)

    def _read(self, images: Tensor) -> Reading:
        seen = self.locate(images)
        certain, boxes = peaks(seen.heat.sigmoid(), seen.sides)
        certain = certain * (certain > _THERE)  # [B, M]
        rows, columns = certain.nonzero(as_tuple=True)
        found = self.name(cuts(images, boxes[rows, columns], rows))

        def spread(values: Tensor) -> Tensor:
            """What was found of cuts, in its place: [B, M, ...], 0 where there is nothing."""
            return values.new_zeros(*certain.shape, values.shape[1]).index_put((rows, columns), values)

        kinds = spread(found.kind.softmax(-1))
        # What is most likely nothing that has a name is counted as no kind.
        counts = spread(F.one_hot(found.kind.argmax(-1), kinds.shape[-1]))[..., :-1].sum(1)
        weight = certain[..., None] * kinds[..., :-1]  # [B, M, K]
        # Of several things of a kind all together say which colour and style they have, and where they are.
        share = (weight + 1e-9) / (weight + 1e-9).sum(1, keepdim=True)

        def of_kinds(values: Tensor) -> Tensor:
            return torch.einsum("bmk,bmc->bkc", share, values)  # [B, K, ...]

        centre = of_kinds((boxes[..., :2] + boxes[..., 2:]) / 2)
        things = (certain[..., None] * spread(found.features)).sum(1)
        return Reading(
            presence=as_array(weight.amax(1)),
            count=as_array(counts.clamp(max=MAX_COUNT)),
            colour=as_array(of_kinds(spread(found.colour.softmax(-1))).argmax(-1)),
            x=as_array(centre[..., 0]),
            y=as_array(centre[..., 1]),
            place=as_array(seen.place.argmax(-1)),
            time=as_array(seen.time.argmax(-1)),
            weather=as_array(seen.weather.argmax(-1)),
            style=as_array(of_kinds(spread(found.style.softmax(-1))).argmax(-1)),
            features=as_array(torch.cat([seen.features, things], dim=1)),
        )


def peaks(heat: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
    """The surest cells that no neighbour is surer than: certainties [B, M], and boxes [B, M, 4].

    heat: [B, n, n], 0 to 1; sides: [B, 4, n, n]. Boxes: left, top, right, bottom in 0..1. Where a picture has
    fewer than M = 8, the certainties of the others are 0.
    """
    n = heat.shape[-1]
    highest = F.max_pool2d(heat[:, None], 3, stride=1, padding=1)[:, 0]
    certain, index = (heat * (heat == highest)).flatten(1).topk(_MOST)
    chosen = sides.flatten(2).gather(2, index[:, None].expand(-1, 4, -1)).transpose(1, 2)  # [B, M, 4]
    x, y = (index % n + 0.5) / n, (index // n + 0.5) / n
    left, top, right, bottom = chosen.unbind(-1)
    return certain, torch.stack([x - left, y - top, x + right, y + bottom], -1)


def cuts(images: Tensor, boxes: Tensor, rows: Tensor) -> Tensor:
    """[N, 3, 32, 32]: square cuts of pictures [B, 3, H, W], a little larger than the boxes [N, 4].

    rows, int64 [N]: which picture each is cut from. What lies outside of it is its edge, continued.
    """
    left, top, right, bottom = boxes.unbind(-1)
    half = _MARGIN * torch.maximum(right - left, bottom - top) / 2
    # Two samples for each pixel and direction, so that large things are not left with every third of theirs.
    steps = (torch.arange(2 * CUT, device=images.device) + 0.5) / CUT - 1  # -1 to 1
    across = 2 * ((left + right) / 2)[:, None] - 1 + 2 * half[:, None] * steps
    down = 2 * ((top + bottom) / 2)[:, None] - 1 + 2 * half[:, None] * steps
    where = torch.stack(
        [across[:, None].expand(-1, 2 * CUT, -1), down[:, :, None].expand(-1, -1, 2 * CUT)], -1
    )
    fine = F.grid_sample(images[rows], where, padding_mode="border", align_corners=False)
    return F.avg_pool2d(fine, 2)
