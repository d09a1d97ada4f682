"""The way of one prompt through the code: every function in the order of its first call, file by file.

`python scripts/walk.py` draws one picture of one step and counts how often a reader who follows it changes
files between the loaded model and the PNG. Networks and the tokenizer, which are the model's own, are left
out; what a reader reads in place is no stop of its own: comprehensions, lambdas, properties, and the methods
that Python calls by itself.
"""

import sys
import tempfile
from functools import cached_property
from itertools import groupby
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PACKAGE = f"{ROOT / 'ldm'}/"
MODELS_OWN = ("models/", "kernels/", "prompts/tokenizer.py")

Stop = tuple[str, str]  # file, function
FIRST, LAST = ("cli/drawing/draw.py", "check_latents"), ("files.py", "temporary_file")


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

    def note(frame: FrameType, event: str, _: object) -> None:
        file, name = frame.f_code.co_filename, frame.f_code.co_qualname.replace(".<locals>", "")
        if event != "call" or not file.startswith(PACKAGE) or name.endswith((">", "__")):
            return
        if not is_property(frame):
            calls.setdefault((file.removeprefix(PACKAGE), name))

    from ldm.cli import txt2img

    sys.setprofile(note)
    try:
        code = txt2img(argv)
    finally:
        sys.setprofile(None)
    assert code == 0
    order = [stop for stop in calls if not stop[0].startswith(MODELS_OWN)]
    return order[order.index(FIRST) : order.index(LAST) + 1]


def is_property(frame: FrameType) -> bool:
    """Whether a call is that of a property of a class of the called function's module."""
    owner, _, name = frame.f_code.co_qualname.rpartition(".")
    return isinstance(vars(frame.f_globals.get(owner, object)).get(name), property | cached_property)


if __name__ == "__main__":
    main()
