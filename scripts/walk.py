"""The way of one prompt through the code: every function in the order of its first call, file by file.

`python scripts/walk.py` draws one picture of one step and counts how often a reader who follows it changes
files between the loaded model and the PNG. Networks are left out; what a reader reads in place is no stop of
its own: comprehensions, lambdas, properties, and the methods that Python calls by itself.
"""

import ast
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PACKAGE = f"{ROOT / 'ldm'}/"
NETWORKS = "models/"

Stop = tuple[str, str]  # file, function


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        picture = str(Path(folder) / "a.png")
        stops = walk(["-p", "a red boat", "--steps", "1", "-q", "-o", picture, *sys.argv[1:]])
    for file, names in visits(stops):
        print(f"{file:32} {', '.join(names)}")
    print(f"{len(visits(stops)) - 1} changes of file over {len({file for file, _ in stops})} files")


def visits(stops: list[Stop]) -> list[tuple[str, list[str]]]:
    """Neighbours in one file, as one visit to it."""
    return [(file, [name for _, name in group]) for file, group in groupby(stops, key=lambda stop: stop[0])]


def walk(argv: list[str]) -> list[Stop]:
    """The functions that `txt2img` calls for the first time between the loaded model and the PNG."""
    calls: dict[Stop, None] = {}
    in_place = properties()

    def note(frame: FrameType, event: str, _: object) -> None:
        file, name = frame.f_code.co_filename, frame.f_code.co_qualname.replace(".<locals>", "")
        if event == "call" and file.startswith(PACKAGE) and not name.endswith((">", "__")):
            calls.setdefault((file.removeprefix(PACKAGE), name))

    from ldm.cli import txt2img

    sys.setprofile(note)
    try:
        code = txt2img(argv)
    finally:
        sys.setprofile(None)
    assert code == 0
    order = [stop for stop in calls if not stop[0].startswith(NETWORKS) and stop[1] not in in_place]
    first, last = order.index(("cli/draw.py", "check_latents")), order.index(("files.py", "temporary_file"))
    return order[first : last + 1]


def properties() -> set[str]:
    """Class.name of every property in the package."""
    found = set()
    for path in (ROOT / "ldm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            methods = node.body if isinstance(node, ast.ClassDef) else []
            for each in methods:
                if isinstance(each, ast.FunctionDef):
                    decorators = {getattr(name, "id", "") for name in each.decorator_list}
                    if decorators & {"property", "cached_property"}:
                        found.add(f"{getattr(node, 'name', '')}.{each.name}")
    return found


if __name__ == "__main__":
    main()
