"""Models on disk."""

from ldm.checkpoint.clip import load_text_encoder
from ldm.checkpoint.folder import embedded, load_folder
from ldm.checkpoint.original.component import load_module
from ldm.checkpoint.parts import Defaults, Parts
from ldm.checkpoint.save import save_folder, save_model, save_module, save_text_encoder, save_tokenizer
from ldm.checkpoint.source import load_parts
from ldm.checkpoint.tokenizer import load_tokenizer

__all__ = [
    "Defaults",
    "Parts",
    "embedded",
    "load_folder",
    "load_module",
    "load_parts",
    "load_text_encoder",
    "load_tokenizer",
    "save_folder",
    "save_model",
    "save_module",
    "save_text_encoder",
    "save_tokenizer",
]
