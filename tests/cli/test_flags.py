"""Flags: their spellings, what they stand for, and what is said of a wrong one."""

from pathlib import Path

import pytest

from ldm import cli
from ldm.cli import command
from ldm.cli.drawing import draw_flags
from ldm.cli.parser import Parser, dashes


def parsed(*argv):
    parser = Parser("txt2img")
    draw_flags.add_flags(parser)
    return parser.parse_args(dashes(argv))


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--ddim_steps", "7"], "steps", 7),
        (["--ddim-steps=7"], "steps", 7),
        (["--steps", "7"], "steps", 7),
        (["--num_inference_steps", "7"], "steps", 7),
        (["--ddim_eta", "0.5"], "eta", 0.5),
        (["--ddim-eta", "0.5"], "eta", 0.5),
        (["--eta", "0.5"], "eta", 0.5),
        (["--scale", "5"], "scale", 5.0),
        (["--cfg_scale", "5"], "scale", 5.0),
        (["--cfg-scale", "5"], "scale", 5.0),
        (["--n_iter", "2"], "n_iter", 2),
        (["--n-iter", "2"], "n_iter", 2),
        (["-b", "2"], "n_iter", 2),
        (["--batch-count", "2"], "n_iter", 2),
        (["--n_samples", "2"], "n_samples", 2),
        (["--n-samples", "2"], "n_samples", 2),
        (["--n_rows", "2"], "n_rows", 2),
        (["--fixed_code"], "fixed_code", True),
        (["--fixed-code"], "fixed_code", True),
        (["--skip_grid"], "skip_grid", True),
        (["--skip-save"], "skip_save", True),
        (["--plms"], "sampler", "pndm"),
        (["--dpm_solver"], "sampler", "dpmpp_2m"),
        (["--sampler", "ddim"], "sampler", "ddim"),
        (["--scheduler", "karras"], "scheduler", "karras"),
        (["--H", "64"], "height", 64),
        (["-H", "64"], "height", 64),
        (["--height", "64"], "height", 64),
        (["--W", "64"], "width", 64),
        (["-W", "64"], "width", 64),
        (["--C", "4"], "C", 4),
        (["--f", "8"], "f", 8),
        (["--precision", "full"], "dtype", "fp32"),
        (["--precision", "autocast"], "dtype", None),
        (["--ckpt", "m"], "model", "m"),
        (["-m", "m"], "model", "m"),
        (["-s", "-1"], "seed", -1),
        (["--negative_prompt", "a_b --c_d"], "negative_prompt", "a_b --c_d"),
        (["--negative_prompt=--a_b"], "negative_prompt", "--a_b"),
        (["--clip_skip", "1"], "clip_skip", 1),
        (["--outdir", "a_b"], "outdir", Path("a_b")),
    ],
)
def test_flags_in_both_spellings(argv, name, value):
    assert getattr(parsed("--prompt", "a", *argv), name) == value


def test_every_long_flag_has_both_spellings():
    parser = Parser("txt2img")
    draw_flags.add_flags(parser)
    long_flags = [flag for action in parser._actions for flag in action.option_strings if "-" in flag[2:]]
    assert len(long_flags) > 15
    assert all("_" not in flag for flag in long_flags)
    assert dashes([flag.replace("-", "_").replace("__", "--", 1) for flag in long_flags]) == long_flags


def test_underscores_change_only_in_names_of_flags():
    argv = ["--from_file=a_b", "-o", "x_y.png", "--prompt", "--not_a flag", "--n_iter", "3"]
    assert dashes(argv) == ["--from-file=a_b", "-o", "x_y.png", "--prompt", "--not_a flag", "--n-iter", "3"]


def test_defaults():
    args = parsed("-p", "a")
    assert (args.seed, args.n_iter, args.n_samples) == (None, 1, 1)
    assert args.outdir == Path("outputs/txt2img-samples")


def test_latent_shape_flags_may_agree_with_the_model(fake, capsys):
    assert cli.txt2img(["-p", "a", "--C", "4", "--f", "8"]) == 0
    assert cli.txt2img(["-p", "a", "--f", "16"]) == 2
    assert "--f 16 does not fit this model, which has 8" in capsys.readouterr().err


def test_what_is_not_allowed_is_called_by_its_flag(fake, capsys):
    assert cli.txt2img(["-p", "a", "--steps", "0", "-W", "100"]) == 2
    told = capsys.readouterr().err
    assert "; --steps 0 is not allowed" in told
    assert "--width 100 is not allowed" in told
    assert command.in_flags("mask_image is not allowed here: only x can").startswith("--mask is not")
    assert command.in_flags("a.png: height is not allowed") == "a.png: height is not allowed"


@pytest.mark.parametrize(
    ("typed", "meant"), [("--stepz", "--steps"), ("--negativ_prompt=x", "--negative-prompt")]
)
@pytest.mark.parametrize(("command", "prog"), [(cli.txt2img, "txt2img"), (cli.main, "ldm txt2img")])
def test_a_misspelt_flag_gets_the_nearest(command, prog, typed, meant, capsys):
    with pytest.raises(SystemExit):
        command([*prog.split()[1:], "-p", "a", typed])
    told = capsys.readouterr().err
    assert told.startswith(f"{prog}: unrecognized arguments: {typed.replace('_', '-')}")
    assert f"did you mean {meant}?" in told
