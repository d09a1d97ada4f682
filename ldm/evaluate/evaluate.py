"""What can be measured of a folder of pictures, with what is given; and what cannot, and why."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.metadata import version

import numpy as np

from ldm.evaluate.distances import frechet_distance, kernel_distance, mmd, precision_recall, psnr
from ldm.evaluate.features import Features, ImageTower, unit
from ldm.evaluate.figures import Figure, Found, mean_figure, merge, rate_figure
from ldm.evaluate.pictures import Pictures, check_apart
from ldm.evaluate.reconstruction import fitted, reconstructed, ssim
from ldm.evaluate.report import rate
from ldm.pipeline import Pipeline
from ldm.request import Request
from ldm.version import __version__

SUBSETS, LARGEST_SUBSET = 100, 1000  # of KID, as in Binkowski et al. 2018
NEIGHBOURS = 3  # of precision and recall, as in Kynkaanniemi et al. 2019
MOST_DB = 100.0  # of pictures that are equal, whose PSNR is infinite
SMALLEST = 6  # pixels, of which SSIM mirrors 5
BATCH = 16  # pictures at once
SETS = ("FID", "KID", "CMMD x 1000", "precision", "recall")
PAIRS = ("CLIP score", "own caption is nearest")
VAE = ("PSNR of the VAE, dB", "SSIM of the VAE", "rFID of the VAE")
PACKAGES = ("torch", "transformers", "numpy", "scipy", "pillow")
# title -> a context with on_progress(done, in all)
Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
Featured = Callable[[ImageTower, Pictures], Features]


@dataclass(frozen=True)
class Tools:
    """What pictures are measured with; each may be missing, and then what needs it is left out.

    extractor: of features for distances between sets. clip: of captions and pictures. vae: a pipeline whose
    autoencoder is measured. drawn: the pictures are the model's own. seed: of subsets and bootstraps.
    notes: what to know of distances by this extractor.
    """

    extractor: ImageTower | None = None
    clip: ImageTower | None = None
    vae: Pipeline | None = None
    drawn: bool = False
    seed: int = 0
    notes: tuple[str, ...] = ()


def evaluate(pictures: Pictures, reference: Pictures | None, tools: Tools, progress: Progress) -> Found:
    """Distances to the reference, agreement with captions, and what the model's VAE loses.

    Raises UserError where two sets cannot be compared, and FloatingPointError for NaN from the VAE.
    """
    told = [] if reference is None else check_apart(pictures, reference)
    featured = cache(partial(_features, progress=progress))  # --clip may be the extractor, too
    parts = [
        Found(protocol=_protocol(pictures, reference, tools)),
        _distances(pictures, reference, tools, featured, told),
        _captions(pictures, tools, featured),
        _vae(pictures if reference is None else reference, reference is None, tools, progress),
    ]
    return merge(parts)


def _protocol(pictures: Pictures, reference: Pictures | None, tools: Tools) -> dict[str, object]:
    """All that decides the figures."""
    used = (*PACKAGES, "torchmetrics") if _torchmetrics() else PACKAGES
    versions = {"ldm": __version__, "python": platform.python_version()} | {p: version(p) for p in used}
    found: dict[str, object] = {"pictures": pictures.protocol()}
    if reference is not None:
        found["reference"] = reference.protocol()
    if tools.extractor is not None:
        found["features"] = tools.extractor.protocol()
    if tools.clip is not None:
        found["clip"] = tools.clip.protocol()
    return {**found, "seed": tools.seed, "versions": versions}


def _torchmetrics() -> bool:
    return importlib.util.find_spec("torchmetrics") is not None


# --- two sets --------------------------------------------------------------------------------------------


def _distances(
    pictures: Pictures, reference: Pictures | None, tools: Tools, featured: Featured, told: Sequence[str]
) -> Found:
    if reference is None:
        return Found(left_out=dict.fromkeys(SETS, "needs --reference FOLDER"))
    if tools.extractor is None:
        return Found(left_out=dict.fromkeys(SETS, "needs --features FOLDER, a CLIP's image tower"))
    a, b = (featured(tools.extractor, each) for each in (pictures, reference))
    return compare(a, b, tools.seed, [*tools.notes, *told])


def _features(tower: ImageTower, pictures: Pictures, progress: Progress) -> Features:
    done, parts = 0, []
    with progress(f"features of {pictures.folder.name}") as on_progress:
        for batch in pictures.batches(BATCH):
            parts.append(tower.features(batch))
            done += len(batch)
            on_progress(done, len(pictures))
    return np.concatenate(parts)


def compare(drawn: Features, reference: Features, seed: int = 0, notes: Sequence[str] = ()) -> Found:
    """FID, KID, CMMD, precision and recall of two sets of features, [N, D] and [M, D]."""
    counts, dims = {"measured": len(drawn), "reference": len(reference)}, drawn.shape[1]
    fewer = min(counts.values())
    shared = tuple(notes)
    few = () if fewer > dims else (_few(fewer, dims),)
    fid = frechet_distance(drawn, reference)
    figures = [Figure("FID", fid, "lower", counts, notes=(*shared, *few))]
    left_out, protocol = {}, {"fid": "Frechet distance of projected CLIP embeddings, not of Inception's"}
    if _torchmetrics():
        size = max(2, min(LARGEST_SUBSET, fewer // 2))
        mean, std = kernel_distance(drawn, reference, SUBSETS, size, seed)
        spread = f"one standard deviation over {SUBSETS} subsets of {size}"
        figures.append(Figure("KID", mean, "lower", counts, mean - std, mean + std, spread, shared))
        protocol["kid"] = f"kernel (x . y / {dims} + 1)^3, mean of {SUBSETS} subsets of {size}"
    else:
        left_out["KID"] = "needs torchmetrics: pip install 'ldm[evaluate]'"
    cmmd = 1000 * mmd(unit(drawn), unit(reference))
    figures.append(Figure("CMMD x 1000", cmmd, "lower", counts, notes=shared))
    protocol["cmmd"] = "Gaussian kernel of bandwidth 10 on embeddings of length 1, unbiased"
    if fewer > NEIGHBOURS:
        precision, recall = precision_recall(drawn, reference, NEIGHBOURS)
        figures.append(rate_figure("precision", precision, counts, shared))
        figures.append(rate_figure("recall", recall, counts, shared))
        protocol["precision_recall"] = f"balls to the nearest neighbour but {NEIGHBOURS - 1}"
    else:
        left_out |= dict.fromkeys(SETS[3:], f"needs more than {NEIGHBOURS} pictures in each folder")
    return Found(tuple(figures), left_out, {}, protocol)


# --- pictures and their captions -------------------------------------------------------------------------


def _captions(pictures: Pictures, tools: Tools, featured: Featured) -> Found:
    if tools.clip is None or not tools.clip.text:
        return Found(left_out=dict.fromkeys(PAIRS, "needs --clip FOLDER, a CLIP with its text tower"))
    told = [(k, caption) for k, caption in enumerate(pictures.captions) if caption is not None]
    if not told:
        why = f"no picture of {pictures.folder} has a caption, beside it or in its metadata"
        return Found(left_out=dict.fromkeys(PAIRS, why))
    images = unit(featured(tools.clip, pictures)[[k for k, _ in told]])
    names, captions = pictures.names(), [caption for _, caption in told]
    texts = dict.fromkeys(captions)
    rows = {caption: row for row, caption in enumerate(texts)}
    cosines = images @ unit(tools.clip.texts(list(texts))).T  # [pictures, captions]
    own = np.array([rows[caption] for caption in captions])
    scores = {
        names[k]: 100 * float(cosine)
        for (k, _), cosine in zip(told, cosines[np.arange(len(own)), own], strict=True)
    }
    cut = tools.clip.cut(captions)
    notes = (f"{cut} of the captions are longer than this CLIP reads: cut",) if cut else ()
    figures = [replace(mean_figure(PAIRS[0], scores, "with captions", tools.seed), notes=notes)]
    left_out = {}
    if len(texts) > 1:
        nearest = rate((cosines.argmax(axis=1) == own).tolist())
        figures.append(rate_figure(PAIRS[1], nearest, {"pictures": len(own), "captions": len(texts)}))
    else:
        left_out[PAIRS[1]] = "all pictures have the same caption"
    protocol = {
        "clip_score": "100 x cosine of image and text embedding, mean, not clipped",
        "without_caption": len(pictures) - len(told),
    }
    return Found(tuple(figures), left_out, {PAIRS[0]: scores}, protocol)


# --- the VAE ---------------------------------------------------------------------------------------------


def _vae(pictures: Pictures, own: bool, tools: Tools, progress: Progress) -> Found:
    """own: `pictures` are those that are measured, and not a reference."""
    if tools.vae is None:
        return Found(left_out=dict.fromkeys(VAE, "needs --model MODEL"))
    if own and tools.drawn:
        why = "the VAE is not measured on pictures that it has made: give --reference FOLDER"
        return Found(left_out=dict.fromkeys(VAE, why))
    through = _through(tools.vae, pictures, tools.extractor, progress)
    size, similar, before = through.size, through.ssim, through.before
    names, seed = pictures.names(), tools.seed
    per_picture = {VAE[0]: dict(zip(names, through.psnr, strict=True))}
    left_out = {}
    if similar:
        per_picture[VAE[1]] = dict(zip(names, similar, strict=True))
    else:
        left_out[VAE[1]] = "needs torchmetrics (pip install 'ldm[evaluate]') and pictures of 6 pixels or more"
    figures = [mean_figure(name, values, "through it", seed) for name, values in per_picture.items()]
    if before and len(pictures) > 1:
        figures.append(_rfid(np.concatenate(before), np.concatenate(through.after), tools.notes))
    else:
        left_out[VAE[2]] = "needs --features FOLDER and 2 pictures or more"
    protocol = {
        "model": tools.vae.name,
        "model_hash": tools.vae.model_hash,
        "dtype": str(next(tools.vae.vae.parameters()).dtype),
        "resize": f"Lanczos until it covers {size[1]}x{size[0]}, the middle cut out",
        "psnr": f"10 log10(255^2 / MSE) on RGB bytes, at most {MOST_DB:g} dB a picture",
        "ssim": "Gaussian window of 11 pixels, sigma 1.5, borders mirrored, RGB in 0..1",
    }
    return Found(tuple(figures), left_out, per_picture, {"vae": protocol})


@dataclass
class _Through:
    """Pictures as the VAE was given them and as it gave them back."""

    size: tuple[int, int]  # (height, width)
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)  # empty where it cannot be measured
    before: list[Features] = field(default_factory=list)  # empty without an extractor
    after: list[Features] = field(default_factory=list)


def _through(pipe: Pipeline, pictures: Pictures, tower: ImageTower | None, progress: Progress) -> _Through:
    found = _Through(pipe.resolve(Request()).size)
    structure = min(found.size) >= SMALLEST and _torchmetrics()
    with progress("through the VAE") as on_progress:
        for batch in pictures.batches(BATCH):
            images = np.stack([fitted(image, found.size) for image in batch])
            copies = reconstructed(pipe, images, BATCH)
            found.psnr += psnr(images, copies).clip(max=MOST_DB).tolist()
            if structure:
                found.ssim += ssim(images, copies).tolist()
            if tower is not None:
                found.before.append(tower.features(images))
                found.after.append(tower.features(copies))
            on_progress(len(found.psnr), len(pictures))
    return found


def _rfid(before: Features, after: Features, notes: Sequence[str]) -> Figure:
    dims, counts = before.shape[1], {"through it": len(before)}
    few = () if len(before) > dims else (_few(len(before), dims),)
    return Figure(VAE[2], frechet_distance(before, after), "lower", counts, notes=(*notes, *few))


def _few(count: int, dims: int) -> str:
    return f"biased: {count} pictures for {dims} dimensions; compare at equal counts only"
