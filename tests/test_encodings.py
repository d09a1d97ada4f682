"""Text files are UTF-8, whatever the system's locale is."""

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("ldm", "scripts") for path in (ROOT / folder).rglob("*.py"))
# A child whose locale is not UTF-8.
PLAIN_ASCII = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
# Whose `open` gives no text: of modules, of storages of bulk drawing, of an example's picture.
OF_BYTES = ("os", "Image", "ImageSequence", "tarfile", "self", "self.storage", "worker.storage", "example")
TRAINER = """
import sys
from pathlib import Path
from ldm.pretrain.vocabulary import train_vocabulary
from ldm.pretrain.recipe import load_recipe
from ldm.train.recipe import read_yaml
from ldm.train.lock import only_run

for folder in map(Path, sys.argv[1:]):
    train_vocabulary(["ein Schlo\\u00df am See", "\\u57ce"] * 3, merges=20, length=16, folder=folder)
    with only_run(folder):
        print(ascii(read_yaml(folder / "recipe.yaml")["validation_prompts"]))
"""


def _unspecified(path):
    """Lines that read or write text in the encoding of the locale; ruff sees those whose type it can tell."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        whose = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        if name not in ("open", "read_text", "write_text") or whose in OF_BYTES:
            continue
        modes = [str(each.value) for each in node.args if isinstance(each, ast.Constant)]
        given = any(each.arg in ("encoding", None) for each in node.keywords)
        if not given and not (name == "open" and any("b" in mode for mode in modes)):
            yield f"{path.relative_to(ROOT)}:{node.lineno}"


def test_every_text_file_has_an_encoding():
    assert [line for path in FILES for line in _unspecified(path)] == []


def test_a_vocabulary_and_a_recipe_in_another_locale(tmp_path):
    """Also where the recipe begins with a byte order mark."""
    folders = {"plain": "", "marked": "\N{BYTE ORDER MARK}"}
    for name, bom in folders.items():
        (tmp_path / name).mkdir()
        recipe = f"{bom}validation_prompts: ['ein Schloß, 城']\n"
        (tmp_path / name / "recipe.yaml").write_text(recipe, encoding="utf-8")
    argv = [sys.executable, "-c", TRAINER, *folders]
    done = subprocess.run(argv, env=PLAIN_ASCII, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [ascii(["ein Schloß, 城"])] * 2
    for name in folders:  # its bytes, each as a letter
        assert '"Ã"' in (tmp_path / name / "vocab.json").read_text(encoding="utf-8")


def test_names_that_the_terminal_lacks_are_shown_with_escapes(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "größe 城.png").write_bytes(b"no picture")
    argv = [sys.executable, "-m", "ldm", "folder", "pictures"]
    console = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(argv, env=console, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert r"gr\xf6\xdfe \u57ce.png: its content is no picture: it is skipped" in done.stdout
