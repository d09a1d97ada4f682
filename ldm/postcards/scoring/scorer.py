"""The scorer: a small network that names what is in a postcard, and where.

It is the instrument that prompt following is measured with, so it learns from renders and their exact
labels only, never from captions or from what the model draws. Each kind of object has its own query that
looks for it on a 16 x 16 map: a head on flattened features does not learn to count.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.checkpoint.io import write_tensors
from ldm.errors import UserError
from ldm.postcards.scoring.names import Names
from ldm.runtime import memory_format

SIZE = 128  # the size of picture that it looks at
MAX_COUNT = 3
WEIGHTS, CONFIG = "scorer.safetensors", "scorer.json"


@dataclass(frozen=True)
class ScorerConfig(Names):
    """The names that the scorer tells apart, and its widths at 1/2, 1/4, 1/8 and 1/16 of the picture."""

    widths: tuple[int, int, int, int] = (32, 48, 112, 144)
    hidden: int = 128


@dataclass(frozen=True)
class Scores:
    """What the network says of B pictures, for K kinds. Logits, and centres in 0..1."""

    count: Tensor  # [B, K, 4]: none, one, two, three
    attention: Tensor  # [B, K, 16, 16]: logarithms, sums to 1 over the map
    density: Tensor  # [B, K, 16, 16]: its sigmoid sums to the count
    colour: Tensor  # [B, K, colours]
    centre: Tensor  # [B, K, 2]: x, y
    place: Tensor  # [B, places]
    time: Tensor
    weather: Tensor
    features: Tensor  # [B, 2 D]: the map's mean and maximum, for distances


@dataclass(frozen=True)
class Reading:
    """What is in B pictures, by index into the instrument's names."""

    presence: NDArray[np.float32]  # [B, K]: probability of one or more
    count: NDArray[np.int64]  # [B, K]: 0..3
    colour: NDArray[np.int64]  # [B, K]
    x: NDArray[np.float32]  # [B, K]: 0 left, 1 right
    y: NDArray[np.float32]  # [B, K]: 0 top, 1 bottom
    place: NDArray[np.int64]  # [B]
    time: NDArray[np.int64]
    weather: NDArray[np.int64]
    style: NDArray[np.int64]  # [B, K]
    features: NDArray[np.float32]  # [B, F]: for distances


class RMSNorm(nn.Module):
    """x / sqrt(mean over channels of x^2) * weight, on [B, C, H, W] (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight.to(x.dtype))
        return y.permute(0, 3, 1, 2)


class Residual(nn.Module):
    """x + conv(relu(conv(norm(x)))), 3 x 3. Starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(F.relu(self.conv1(self.norm(x))))
        return x + y


class Descent(nn.Module):
    """Pictures [B, 3, H, W] to maps of 1/8 and of 1/16 of them, of `widths` at 1/2, 1/4, 1/8 and 1/16."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        half, quarter, eighth, sixteenth = widths
        self.stem = nn.Conv2d(3, half, 5, stride=2, padding=2)
        self.down1 = nn.Conv2d(half, quarter, 3, stride=2, padding=1)
        self.block1 = Residual(quarter)
        self.down2 = nn.Conv2d(quarter, eighth, 3, stride=2, padding=1)
        self.block2 = Residual(eighth)
        self.down3 = nn.Conv2d(eighth, sixteenth, 3, stride=2, padding=1)

    def descend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.block1(self.down1(F.relu(self.stem(x))))
        x = self.block2(self.down2(F.relu(x)))
        return x, self.down3(F.relu(x))


class Trunk(Descent):
    """Pictures [B, 3, 128, 128] to a map [B, D, 16, 16] that has seen an 8 x 8 map of the whole."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__(widths)
        *_, eighth, sixteenth = widths
        self.middle = nn.Sequential(Residual(sixteenth), Residual(sixteenth))
        self.up = nn.Conv2d(sixteenth, eighth, 1)
        self.block3 = Residual(eighth)
        self.norm = RMSNorm(eighth)

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.descend(x)
        x = x + F.interpolate(self.up(self.middle(y)), scale_factor=2.0)
        out: Tensor = self.norm(self.block3(x))
        return out


class KindHeads(nn.Module):
    """For each kind: attention pooling of the map, a density that sums to the count, and an MLP on both.

    The density is that of Lempitsky and Zisserman 2010, "Learning to count objects in images", eq. 1: pooling
    with weights that sum to 1 could not tell one from two. The centre is the attention's mean position.
    """

    def __init__(self, dim: int, kinds: int, colours: int, hidden: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, kinds)
        self.density = nn.Linear(dim, kinds)
        nn.init.constant_(self.density.bias, -6.0)  # next to nothing is there at first
        self.pooled = nn.Linear(dim, hidden)
        self.total = nn.Linear(1, hidden, bias=False)
        self.kind = nn.Parameter(0.1 * torch.randn(kinds, hidden))
        self.count = nn.Linear(hidden, MAX_COUNT + 1)
        self.colour = nn.Linear(hidden, colours)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """tokens [B, H, W, D] -> count logits, log attention, density logits, colour logits, centres."""
        _, h, w, _ = tokens.shape
        flat = tokens.flatten(1, 2)  # [B, N, D]
        attention = self.query(flat).log_softmax(dim=1).transpose(1, 2)  # [B, K, N]
        density = self.density(flat).transpose(1, 2)
        total = density.sigmoid().sum(dim=2)  # [B, K]
        pooled = attention.exp() @ flat  # [B, K, D]
        y, x = torch.meshgrid(_cells(h, flat), _cells(w, flat), indexing="ij")
        centre = attention.exp() @ torch.stack([x, y], -1).flatten(0, 1)
        mixed = F.relu(self.pooled(pooled) + self.total(total[..., None]) + self.kind)
        return (
            self.count(mixed),
            attention.unflatten(2, (h, w)),
            density.unflatten(2, (h, w)),
            self.colour(mixed),
            centre,
        )


def _cells(n: int, like: Tensor) -> Tensor:
    """Centres of n cells that share 0..1."""
    return (torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) / n


class Instrument(nn.Module, ABC):
    """Reads pictures; what `prompt following` is measured with."""

    config_class: ClassVar[type[Names]]

    def __init__(self, config: Names) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def _read(self, images: Tensor) -> Reading:
        """images: [B, 3, 128, 128] in [-1, 1]."""

    @torch.inference_mode()
    def read(self, images: NDArray[np.uint8], batch_size: int = 64) -> Reading:
        """Read uint8 pictures [N, H, W, 3], resized to 128 x 128 where they are not.

        In fp32 and in fixed batches, so that the same pictures are read the same every time.
        """
        parts = [
            self._read(self._prepare(images[i : i + batch_size])) for i in range(0, len(images), batch_size)
        ]
        return Reading(*(np.concatenate([getattr(part, name) for part in parts]) for name in _FIELDS))

    def _prepare(self, images: NDArray[np.uint8]) -> Tensor:
        device = next(self.parameters()).device
        x = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        if x.shape[-2:] != (SIZE, SIZE):
            x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True)
        return x

    def save(self, folder: Path) -> None:
        """Write scorer.safetensors (fp16) and scorer.json."""
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS, self.state_dict(), torch.float16)
        (folder / CONFIG).write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what was saved, fp32. Raises UserError naming the file that is missing or does not fit."""
        try:
            raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
            config = cls.config_class(**values)
            weights = load_file(folder / WEIGHTS)
        except FileNotFoundError as error:
            raise UserError(f"no scorer in {folder}: {error.filename} is missing; train one first") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"{folder / CONFIG} does not describe a scorer: {error}") from error
        scorer = cls(config)
        try:
            scorer.load_state_dict({name: value.float() for name, value in weights.items()})
        except RuntimeError as error:
            raise UserError(f"{folder / WEIGHTS} does not fit {CONFIG}: {error}") from error
        return scorer.eval()


class Scorer(Instrument):
    """Names kinds, counts, colours, centres, place, time and weather of 128 x 128 pictures."""

    config: ScorerConfig
    config_class = ScorerConfig

    def __init__(self, config: ScorerConfig) -> None:
        super().__init__(config)
        dim = config.widths[2]
        self.trunk = Trunk(config.widths)
        self.objects = KindHeads(dim, len(config.kinds), len(config.colours), config.hidden)
        self.scene = nn.Linear(2 * dim, config.hidden)
        self.place = nn.Linear(config.hidden, len(config.places))
        self.time = nn.Linear(config.hidden, len(config.times))
        self.weather = nn.Linear(config.hidden, len(config.weathers))

    def forward(self, images: Tensor) -> Scores:
        """images: [B, 3, 128, 128] in [-1, 1]."""
        images = images.contiguous(memory_format=memory_format(images.device))
        tokens = self.trunk(images).permute(0, 2, 3, 1)  # [B, 16, 16, D]
        # The pooling sums 256 small numbers, which bf16 cannot.
        with torch.autocast(images.device.type, enabled=False):
            tokens = tokens.float()
            count, attention, density, colour, centre = self.objects(tokens)
            features = torch.cat([tokens.mean((1, 2)), tokens.amax((1, 2))], dim=1)
            scene = F.relu(self.scene(features))
            return Scores(
                count=count,
                attention=attention,
                density=density,
                colour=colour,
                centre=centre,
                place=self.place(scene),
                time=self.time(scene),
                weather=self.weather(scene),
                features=features,
            )

    def _read(self, images: Tensor) -> Reading:
        scores = self(images)
        chance = scores.count.softmax(-1)
        return Reading(
            presence=as_array(1 - chance[..., 0]),
            count=as_array(chance.argmax(-1)),
            colour=as_array(scores.colour.argmax(-1)),
            x=as_array(scores.centre[..., 0]),
            y=as_array(scores.centre[..., 1]),
            place=as_array(scores.place.argmax(-1)),
            time=as_array(scores.time.argmax(-1)),
            weather=as_array(scores.weather.argmax(-1)),
            style=np.zeros(scores.count.shape[:2], np.int64),  # it knows the postcards' alone
            features=as_array(scores.features),
        )


_FIELDS = tuple(Reading.__dataclass_fields__)


def as_array(values: Tensor) -> NDArray[Any]:
    """On the CPU, as numpy's."""
    return values.cpu().numpy()
