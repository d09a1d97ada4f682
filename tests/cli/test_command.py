"""How a command starts and ends: help, version, Ctrl-C, errors, warnings."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from fake_pipeline import FakePipeline, files

import ldm
from ldm import cli
from ldm.cli import command
from ldm.images.png import read_request

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "scripts" / "txt2img.py")


@pytest.mark.parametrize("command", [["-m", "ldm"], ["-m", "ldm", "txt2img"], [SCRIPT]])
def test_help_needs_no_installation_and_no_heavy_module(command, tmp_path):
    argv = [sys.executable, "-X", "importtime", *command, "--help"]
    cwd = ROOT if "-m" in command else tmp_path
    out = subprocess.run(argv, capture_output=True, text=True, cwd=cwd, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in out.stderr.splitlines()}
    assert "argparse" in loaded
    assert not loaded & {"torch", "numpy", "pydantic", "rich", "PIL", "transformers"}
    assert "usage:" in out.stdout


def test_version(capsys):
    for program in (cli.txt2img, cli.main):
        with pytest.raises(SystemExit) as stop:
            program(["--version"])
        assert stop.value.code == 0
        assert capsys.readouterr().out == f"ldm {ldm.__version__}\n"


def test_ctrl_c_keeps_finished_pictures(fake, capsys):
    fake.fail_at, fake.error = 8, KeyboardInterrupt()  # in the third of four batches
    assert cli.txt2img(["-p", "a", "--n_iter", "4", "--outdir", "o"]) == 130
    assert files("o") == ["samples/00000.png", "samples/00001.png"]
    assert [read_request(f"o/samples/0000{k}.png").seeds for k in range(2)] == [(42,), (43,)]
    assert "stopped; finished pictures are kept" in capsys.readouterr().err


def test_our_own_errors_are_one_line_and_exit_code_1(fake, capsys):
    fake.fail_at, fake.error = 2, IndexError("list index out of range\nmore")
    assert cli.txt2img(["-p", "a", "--quiet", "--outdir", "o"]) == 1
    assert capsys.readouterr().err == (
        "txt2img: internal error: IndexError: list index out of range "
        "(please report it, with what --debug shows)\n"
    )
    assert not Path("o").exists()


def test_debug_shows_the_traceback(fake, capsys):
    fake.fail_at, fake.error = 2, IndexError("deep inside")
    assert cli.txt2img(["-p", "a", "--quiet", "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "in draw_images" in err


def test_a_full_disk_is_the_users_to_put_right():
    error = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert command.verdict(error) == ("no space left on the disk", 2)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried ...")])
def test_memory_that_a_model_does_not_fit_into_is_the_users_too(error):
    line, code = command.verdict(error)
    assert line.startswith("not enough memory: a smaller model or picture")
    assert code == 2
    assert command.verdict(RuntimeError("illegal memory access"))[1] == 1


def test_ctrl_c_where_nothing_is_drawn(monkeypatch, capsys):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ldm.images.png.read_request", stop)
    assert cli.main(["info", "a.png"]) == 130
    assert capsys.readouterr().err == "stopped; nothing half-written is left\n"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_is_the_users_to_put_right(fake, capsys, error):
    fake.fail_at, fake.error = 1, error
    assert cli.txt2img(["-p", "a", "--quiet", "--n_samples", "2"]) == 2
    assert capsys.readouterr().err == (
        "txt2img: not enough memory for 2 pictures of 24x16: ask for smaller ones, or fewer at once\n"
    )


def test_a_batch_that_memory_cannot_hold_is_refused(fake, capsys):
    assert cli.txt2img(["-p", "a", "-W", "4096", "-H", "4096", "--n_samples", "5"]) == 2
    assert "5 pictures of 4096x4096 are too many for one batch: ask for at most 4" in capsys.readouterr().err
    assert fake.requests == []


def test_warnings_are_one_line(fake, capsys, monkeypatch):
    def resolve(request):
        warnings.warn("the grid starts at t <= 1", stacklevel=2)
        return FakePipeline.resolve(fake, request)

    monkeypatch.setattr(fake, "resolve", resolve)
    assert cli.txt2img(["-p", "a", "-q"]) == 0
    assert "txt2img: warning: the grid starts at t <= 1\n" in capsys.readouterr().err


SAYS_MORE = """
import atexit, sys, threading
from ldm import cli
atexit.register(print, "and this at the end")
returned = threading.Event()
threading.Thread(target=returned.wait, daemon={daemon}).start()
sys.argv = ["ldm", "info", "missing.png"]
code = cli.main()
returned.set()
sys.exit(code + 10)
"""


@pytest.mark.parametrize(("daemon", "code"), [(True, 2), (False, 12)])
def test_a_process_ends_at_once_unless_a_thread_still_works(daemon, code, tmp_path):
    argv = [sys.executable, "-c", SAYS_MORE.format(daemon=daemon)]
    out = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert out.returncode == code
    assert out.stdout == "and this at the end\n"
    assert "missing.png" in out.stderr


def test_a_call_from_python_does_not_end_the_process():
    assert cli.main(["info", "missing.png"]) == 2
