"""Templates of prompts: `__animal__`, a line of animal.txt, and `{red|blue}`, one of several.

Read by the dynamicprompts package, whose users know the syntax from AUTOMATIC1111's extension: `{2$$a|b|c}`,
`{0.3::a|b}`, `__places/*__`, `${x=...}`.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from ldm.errors import UserError, abbreviate, reason

_LOCK = threading.Lock()  # its parser (pyparsing) has settings of the whole process


def expand(template: str, seed: int, folder: str | Path | None = None) -> str:
    """One of the prompts that a template stands for; the same one for the same seed and files.

    Args:
        folder: of the .txt, .yaml and .json files that wildcards name; None: there are none.

    Raises:
        UserError: for a template that cannot be read, a wildcard without a file, one that holds itself, and
            where dynamicprompts is not installed.
    """
    try:
        from dynamicprompts.generators import RandomPromptGenerator
        from pyparsing import ParseBaseException
    except ModuleNotFoundError:
        raise UserError("wildcards need the package dynamicprompts: pip install dynamicprompts") from None
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"{folder} is no folder: give the one whose files the wildcards name")
    try:
        with _LOCK:
            files = _manager(folder)
            (prompt,) = RandomPromptGenerator(files, seed=seed).generate(template, 1)
    except ParseBaseException as error:
        raise UserError(
            f"the prompt {template!r:.80} cannot be read as a template from character {error.loc + 1} on: "
            "close its brackets, and write wildcards as __name__"
        ) from None
    except RecursionError:
        raise UserError(f"the prompt {template!r:.80} names a wildcard that holds itself") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"the wildcards of {folder} cannot be read: {reason(error)}") from None
    return str(prompt)


def _manager(folder: str | Path | None) -> Any:
    """The files of a folder; where the package would leave a name that has none in the prompt, it is told."""
    from dynamicprompts.wildcards import WildcardManager

    logging.getLogger("dynamicprompts").setLevel(logging.ERROR)

    class Files(WildcardManager):  # type: ignore[misc]
        def get_values(self, wildcard: str) -> Any:
            found = super().get_values(wildcard)
            if not found:
                names = sorted(self.get_collection_names())
                known = f"{folder} has {abbreviate(names, 8)}" if names else "give --wildcards FOLDER"
                raise UserError(f"there is no wildcard {wildcard}: {known}")
            return found

    return Files(folder)
