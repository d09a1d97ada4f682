"""What is installed is what is here."""

import configparser
import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]


def config():
    read = configparser.ConfigParser()
    read.read(ROOT / "setup.cfg", encoding="utf-8")
    return read


def test_every_room_is_installed():
    rooms = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "ldm").rglob("__init__.py")}
    assert set(config()["options"]["packages"].split()) == rooms | {"ldm.configs", "ldm.weights"}


def test_files_that_are_no_code_are_installed():
    said = config()["options.package_data"]
    other = [
        file.relative_to(ROOT / "ldm")
        for file in (ROOT / "ldm").rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    ]
    assert other
    for file in other:
        ways = [(package, pattern) for package, patterns in said.items() for pattern in patterns.split()]
        paths = [(ROOT / package.replace(".", "/"), pattern) for package, pattern in ways]
        assert any(
            fnmatch.fnmatch(str(ROOT / "ldm" / file), str(folder / pattern)) for folder, pattern in paths
        ), file
