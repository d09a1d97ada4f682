"""Models on disk."""

from ldm.checkpoint.clip import load_text_encoder, load_tokenizer, save_text_encoder, save_tokenizer
from ldm.checkpoint.folder import (
    Defaults,
    Parts,
    embedded,
    load_folder,
    load_module,
    save_folder,
    save_module,
)

__all__ = [
    "Defaults",
    "Parts",
    "embedded",
    "load_folder",
    "load_module",
    "load_text_encoder",
    "load_tokenizer",
    "save_folder",
    "save_module",
    "save_text_encoder",
    "save_tokenizer",
]
