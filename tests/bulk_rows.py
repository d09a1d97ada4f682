"""Rows of quick pictures for tests of bulk drawing."""

import json

ROWS = [
    {"id": f"row-{k}", "prompt": f"the red boat {k}", "steps": 2, "width": 16 if k % 3 else 24, "height": 16}
    for k in range(7)
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
