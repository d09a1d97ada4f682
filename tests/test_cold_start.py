"""What a plain drawing imports: torch takes two seconds, and nothing else may take its time."""

import subprocess
import sys

HEAVY = {"transformers", "diffusers", "accelerate", "peft", "sympy", "scipy", "yaml", "huggingface_hub"}
HEAVY |= {"torch._dynamo", "torch._inductor", "torchmetrics", "torchsde", "skia", "PIL.FitsImagePlugin"}
SCRIPT = """
import sys
from ldm.cli.command import main
try:
    main(["txt2img", "-p", "a red boat", "--steps", "2", "-o", sys.argv[1], "--quiet"])
finally:
    print("loaded:", *sys.modules)
"""


def test_a_plain_drawing_imports_nothing_heavy(tmp_path):
    picture = tmp_path / "boat.png"
    run = subprocess.run([sys.executable, "-c", SCRIPT, picture], capture_output=True, text=True, check=True)
    assert picture.exists()
    loaded = set(run.stdout.partition("loaded: ")[2].split())
    assert "torch" in loaded
    assert not HEAVY & loaded
