"""The command line: `txt2img` and `ldm`, one file a command.

Heavy modules are imported where they are first needed, so that `--help` answers at once.
"""

from ldm.cli.command import main, txt2img

__all__ = ["main", "txt2img"]
