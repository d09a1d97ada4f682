"""What a request says of the files that it uses: by which name, how, and which file it was."""

from __future__ import annotations

from ldm.request.fields import Checked, Digest, Scale, Text


class LoraUse(Checked):
    """An adapter by its name, how strongly it acts, and which file it was."""

    name: Text
    weight: Scale = 1.0  # on the U-Net
    text_weight: Scale | None = None  # on the text encoders; None: the same
    sha256: Digest | None = None


class EmbeddingUse(Checked):
    """A textual inversion by the word that it is written as, and which file it was."""

    name: Text
    sha256: Digest
