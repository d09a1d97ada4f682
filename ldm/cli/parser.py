"""The parser of all commands: whole flags only, dashes or underscores, one line about what is wrong."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ldm.files import is_url


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes whole flags only and says what is wrong in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

        self.add_argument(
            "--version",
            action=ShowVersion,
            nargs=0,
            default=argparse.SUPPRESS,  # it leaves no value: a request has a version of its own
            help="show the version and exit",
        )
        self.add_flags: list[Callable[[Parser], object]] = []  # called when this command is the one asked for

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Unknown flags are told by the command that does not know them, with the nearest that it knows."""
        while self.add_flags:
            self.add_flags.pop()(self)
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(
                dashes(unknown)[0].partition("=")[0], self._option_string_actions, 1
            )
            hint = f"; did you mean {near[0]}?" if near and unknown[0].startswith("--") else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help shows every flag)\n")


def dashes(argv: Sequence[str]) -> list[str]:
    """--from_file is --from-file: underscores in the name of a long flag become dashes."""
    return [re.sub(r"^--[\w-]+(?==|$)", lambda name: name[0].replace("_", "-"), arg) for arg in argv]


def count(text: str) -> int:
    """A whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 up")
    return int(text)


def place(text: str) -> Path | str:
    """A path, or a URL as it is."""
    return text if is_url(text) else Path(text)


class ShowVersion(argparse.Action):
    """Print the version and exit. An action of its own because finding the version takes time."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from ldm.version import __version__

        print(f"ldm {__version__}")
        parser.exit()
