"""Maps that networks make of pictures: transformers folders that the user has, read offline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import UserError, reason
from ldm.preprocess.pictures import Levels, Picture

Estimator = Callable[[Picture], Levels]
# What a folder is given for -> transformers' class for it.
CLASSES = {"depth": "AutoModelForDepthEstimation", "segmentation": "AutoModelForSemanticSegmentation"}


def load_estimator(kind: str, folder: str | Path) -> Estimator:
    """A network of `CLASSES` as a function of a picture, in fp32 on the CPU: maps at the picture's size.

    Of depth what the network says (most say nearness, those of metres distance); of a segmentation the number
    of each pixel's class. Only safetensors are read. Raises UserError for a folder that does not hold all.
    """
    folder = Path(folder)
    for name in ("config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise UserError(f"--{kind}-model {folder} has no {name}: give a folder in transformers' layout")
    model, processor = _load(kind, folder)
    read = _depth if kind == "depth" else _classes
    return lambda picture: read(model, processor, picture)


def _load(kind: str, folder: Path) -> tuple[Any, Any]:
    import torch
    import transformers
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it would tell that torchvision is not there, which nothing needs
    try:
        model, info = getattr(transformers, CLASSES[kind]).from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        processor = transformers.AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, backend="pil"
        )
    except Exception as error:  # safetensors and transformers have their own
        raise UserError(f"--{kind}-model {folder} cannot be read: {reason(error)}") from None
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
    if absent := sorted(info["missing_keys"]):
        raise UserError(f"--{kind}-model {folder} lacks {absent[0]} and {len(absent) - 1} more tensors")
    return model.eval(), processor


def _depth(model: Any, processor: Any, picture: Picture) -> Levels:
    (found,) = processor.post_process_depth_estimation(
        _answer(model, processor, picture), target_sizes=[picture.shape[:2]]
    )
    return _levels(found["predicted_depth"])


def _classes(model: Any, processor: Any, picture: Picture) -> Levels:
    (found,) = processor.post_process_semantic_segmentation(
        _answer(model, processor, picture), target_sizes=[picture.shape[:2]]
    )
    return _levels(found)


def _answer(model: Any, processor: Any, picture: Picture) -> Any:
    import torch

    with torch.inference_mode():
        return model(**processor(images=picture, return_tensors="pt", input_data_format="channels_last"))


def _levels(tensor: Any) -> Levels:
    """[H, W], or with leading sides of 1, as float32."""
    levels: Levels = np.asarray(tensor.float().cpu().numpy(), dtype=np.float32)
    return levels.reshape(levels.shape[-2:])
