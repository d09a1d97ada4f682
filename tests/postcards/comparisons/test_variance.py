"""What is said of the variance of DDPM's steps: the bound of the pipeline's own network, and the command."""

import json
import runpy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pipeline import make_folder

import ldm
from ldm.checkpoint import save_folder
from ldm.diffusion.bound import bits_per_dim, bound
from ldm.diffusion.methods.ancestral import ddpm
from ldm.diffusion.noise import Noise
from ldm.finetune.variance import widen_output
from ldm.pipeline import Pipeline
from ldm.postcards.comparisons import variance as module
from ldm.postcards.comparisons.variance import asked, bits_of, denoiser, draw, learned_shares, variances_of
from ldm.postcards.scoring.agreement import names
from ldm.postcards.scoring.prompts import evaluation_prompts
from ldm.postcards.scoring.scorer import Scorer
from ldm.postcards.scoring.sources import latents_of, rendered, to_uint8

ROOT = Path(__file__).parents[3]
PROMPTS = evaluation_prompts(3)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """A tiny model that says the variance u = 0.75 everywhere."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_folder(folder)
    wide = widen_output(ldm.load(folder, device="cpu", dtype="fp32").parts)
    with torch.no_grad():
        wide.unet.conv_out.bias[4:] = 0.5
    return Pipeline.from_parts(wide)


def test_the_bound_is_that_of_the_models_own_network(pipe):
    """One call of the network serves all variances; here each asks it again."""
    assert variances_of(pipe) == ["fixed_small", "fixed_large", "learned_range"]
    found = bits_of(pipe, PROMPTS, 3)
    job, x0 = asked(pipe, PROMPTS, 3)
    assert torch.equal(x0, latents_of(pipe, rendered(PROMPTS, 16)))
    with torch.no_grad():
        for variance, (total, steps) in found.items():
            bits = []
            for batch in pipe.prepare(list(job.requests), batch_size=1).batches:
                (k,), denoise = [each.prompt for each in batch], denoiser(pipe, job, batch)
                terms = bound(denoise, x0[k : k + 1], job.grid.sigmas, Noise([k]), variance=variance)
                bits.append([float(bits_per_dim(term.nats, x0[0].numel())) for term in terms])
            assert total == pytest.approx(np.sum(bits) / 3, rel=1e-4)
            assert steps == pytest.approx(np.sum(np.array(bits)[:, 1:-1]) / 3, rel=1e-4)
    assert len({round(total, 6) for total, _ in found.values()}) == 3


def test_a_learned_share_is_what_the_network_says(pipe):
    shares = learned_shares(pipe, PROMPTS, 4)
    assert list(shares.values()) == pytest.approx([0.75] * len(shares), abs=1e-4)
    assert max(shares) > 500
    fixed = Pipeline.from_parts(
        replace(pipe.parts, scheduler={**pipe.parts.scheduler, "variance_type": None})
    )
    assert variances_of(fixed) == ["fixed_small", "fixed_large"]


def test_pictures_are_of_their_variance(pipe, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 2)
    drawn = draw(pipe, PROMPTS, 3, "fixed_large", 2.0)
    solver = partial(ddpm, variance="fixed_large")
    given = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}
    (alone,) = pipe(PROMPTS[2].text, seed=2, sampler=solver, **given).images
    assert abs(drawn[2].astype(int) - to_uint8(alone[None])[0].astype(int)).max() <= 1
    assert (drawn != draw(pipe, PROMPTS, 3, "learned_range", 2.0)).any()


def test_the_command_writes_its_figures(pipe, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    Scorer(names()).eval().save(tmp_path / "scorer")
    save_folder(tmp_path / "model", pipe.parts)
    monkeypatch.setattr(sys, "argv", ["evaluate_variance.py", "--model", str(tmp_path / "model")])
    sys.argv += ["--scorer", str(tmp_path / "scorer"), "--n", "3", "--latents", "3", "--steps", "2", "3"]
    sys.argv += ["--out", str(tmp_path / "figures.json")]
    runpy.run_path(str(ROOT / "scripts" / "evaluate_variance.py"), run_name="__main__")
    found = json.loads((tmp_path / "figures.json").read_text())
    figures = [(each["variance"], each["steps"]) for each in found["figures"]]
    assert figures == [(each, n) for n in (2, 3) for each in ("fixed_small", "fixed_large", "learned_range")]
    assert "learned_range" in capsys.readouterr().out
