"""ldm and its peers side by side: the same weights, inputs, sampler and steps, in turn, round after round.

python scripts/bench.py                                  all models, rows and peers that are installed
python scripts/bench.py --quick                          five minutes
python scripts/bench.py --models sd15 --rows unet --peers ldm-bf16 openvino-bf16
python scripts/bench.py --models FOLDER --rows load      a pipeline folder of one's own
python scripts/bench.py --models sd15 --rows lora full   steps of training, at random weights

Each peer runs in a process of its own, which waits while others have their turn. The report (docs/benchmarks)
has medians, ratios, relative errors, versions and the command; its README.md says how to read it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.command import main

if __name__ == "__main__":
    main(str(__doc__))
