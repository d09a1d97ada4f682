"""LoRA and its kin, and textual inversion: what changes a model without being one."""

from ldm.adapters.adapted import Adapted, adapt, find_lora, used_embeddings, wanted_loras
from ldm.adapters.inversion import Embedding, read_embedding
from ldm.adapters.lora import Lora, LoraFile, Report, read_lora

__all__ = [
    "Adapted",
    "Embedding",
    "Lora",
    "LoraFile",
    "Report",
    "adapt",
    "find_lora",
    "read_embedding",
    "read_lora",
    "used_embeddings",
    "wanted_loras",
]
