"""The documents tell the truth about where things are."""

import re
from pathlib import Path

import pytest

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
