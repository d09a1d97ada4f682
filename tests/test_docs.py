"""The documents tell the truth about where things are."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ldm
from ldm.diffusion.guidances.catalogue import GUIDANCES, options_of

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# [label]: path "function", as docs/models.md names its proofs.
REFERENCE = re.compile(r'^\[([^]]+)\]: (\S+)(?: "(\w+)")?$', re.MULTILINE)
INLINE = re.compile(r"\]\(([^)#]+)[^)]*\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document):
    text = document.read_text()
    targets = [*INLINE.findall(text), *(path for _, path, _ in REFERENCE.findall(text))]
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []


def test_every_proof_is_a_test_that_is_there():
    document = ROOT / "docs" / "models.md"
    text = document.read_text()
    proofs = REFERENCE.findall(text)
    assert len(proofs) > 50
    body = REFERENCE.sub("", text)
    for label, path, function in proofs:
        assert f"def {function}(" in (document.parent / path).read_text(), (label, function)
        assert f"[{label}]" in body, f"[{label}] is not used"
    used = re.findall(r"\[[^][]+\]\[([^][]+)\]|\[([^][]+)\](?![:(\[])", body)
    assert {first or second for first, second in used} <= {label for label, _, _ in proofs}


def test_scripts_are_thin_entry_points():
    """As README says; the benchmarks are programs, and say so."""
    lines = {path.name: len(path.read_text("utf-8").splitlines()) for path in (ROOT / "scripts").glob("*.py")}
    assert {name: n for name, n in lines.items() if n > 70 and not name.startswith("bench")} == {}
    assert max(lines.values()) < 200


def test_the_gallery_has_all_prompts_with_all_seeds(families, tmp_path, monkeypatch):
    model = families("sd1")[0]
    (tmp_path / "prompts.txt").write_text("a red boat\na blue house\n")
    monkeypatch.setattr(sys, "argv", ["draw_gallery.py", str(model), "--out", str(tmp_path)])
    sys.argv += ["--prompts", str(tmp_path / "prompts.txt")]
    runpy.run_path(str(ROOT / "scripts" / "draw_gallery.py"), run_name="__main__")
    page = (tmp_path / "gallery.md").read_text()
    assert "2 prompts written by hand, each drawn with the seeds 0, 1, 2, 3" in page
    assert "| a blue house | ![a blue house](gallery/01.webp) |" in page
    pipe = ldm.load(model)
    own, other = (pipe("a blue house", seed=seed).images[0] for seed in (3, 2))
    with Image.open(tmp_path / "gallery" / "01.webp") as strip:
        found = strip.convert("RGB").crop((strip.width - own.width - 2, 2, strip.width - 2, strip.height - 2))
    gaps = [np.abs(np.asarray(found, np.float64) - np.asarray(each)).mean() for each in (own, other)]
    assert gaps[0] < 0.6 * gaps[1]  # WebP loses much of pictures that are noise


def test_every_guidance_is_on_its_page_with_its_options():
    """Name, paper and options, with their defaults where they are numbers."""
    rows = [line.split(" | ") for line in (ROOT / "docs" / "guidance.md").read_text().splitlines()]
    rows = {cells[0].strip("| `"): cells for cells in rows if len(cells) == 5 and "`" in cells[0]}
    assert rows.keys() == GUIDANCES.keys()
    for name, part in GUIDANCES.items():
        paper, options = rows[name][2], rows[name][4]
        for number in re.findall(r"arXiv \d{4}\.\d{5}", part.source):
            assert number in paper, name
        above = [
            each for each in GUIDANCES.values() if each is not part and f"those of `{each.name}`" in options
        ]
        for key in options_of(part):
            assert f"`{key}`" in options or any(key in options_of(each) for each in above), (name, key)
