"""LoRA and its kin, textual inversion and IP-Adapters: what changes a model without being one."""

from ldm.adapters.adapted import Adapted, adapt, find_lora, used_embeddings, wanted_loras
from ldm.adapters.image_prompt import ImagePromptFile, read_image_prompt
from ldm.adapters.inversion import Embedding, read_embedding
from ldm.adapters.lora import Lora, LoraFile, Report, read_lora

__all__ = [
    "Adapted",
    "Embedding",
    "ImagePromptFile",
    "Lora",
    "LoraFile",
    "Report",
    "adapt",
    "find_lora",
    "read_embedding",
    "read_image_prompt",
    "read_lora",
    "used_embeddings",
    "wanted_loras",
]
