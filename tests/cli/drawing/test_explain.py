"""What is told of a prompt."""

import ldm
from ldm.cli.drawing.explain import explain


def lines(**fields):
    pipe = ldm.load(device="cpu", dtype="fp32")
    return list(explain(pipe.prepare(ldm.Request(**fields))))


def test_tokens_weights_parts_and_steps():
    told = lines(
        prompt="a (red:1.3) house, [a boat:a tree:0.5] AND a blue balloon :0.5", num_inference_steps=8
    )
    assert told == [
        "prompt: a (red:1.3) house, [a boat:a tree:0.5] AND a blue balloon :0.5",
        "steps 1 to 4 of 8",
        "  part 1, share 1: 6 tokens in 1 window of 46",
        "    1, 6 of 46: a [red] x 1.3 house , a boat",
        "  part 2, share 0.5: 3 tokens in 1 window of 46",
        "    1, 3 of 46: a blue balloon",
        "  negative prompt: 0 tokens in 1 window of 46",
        "steps 5 to 8 of 8",
        "  part 1, share 1: 6 tokens in 1 window of 46",
        "    1, 6 of 46: a [red] x 1.3 house , a tree",
        "  part 2, share 0.5: 3 tokens in 1 window of 46",
        "    1, 3 of 46: a blue balloon",
        "  negative prompt: 0 tokens in 1 window of 46",
    ]


def test_windows_are_those_that_are_read():
    pipe = ldm.load(device="cpu", dtype="fp32")
    prompt = "a red house BREAK " + "a blue boat, " * 20
    told = list(explain(pipe.prepare(ldm.Request(prompt=prompt))))
    windows = pipe.text.count_windows([prompt], grammar="a1111")
    assert windows > 2
    assert len([line for line in told if " of 46: " in line]) == windows


def test_regions_and_an_edits_target_are_told_by_name():
    told = lines(
        prompt="sea", regions=["0,0,1,0.5: [sky:cloud:0.5]", "0,0.5,1,0.5: sea"], num_inference_steps=2
    )
    names = [line.strip().partition(":")[0] for line in told if " tokens in " in line]
    assert names == 2 * ["prompt", "negative prompt", "region 1", "region 2"]
    told = lines(prompt="sea", target_prompt="a boat")
    assert any(line.startswith("  target prompt: 2 tokens") for line in told)
