"""Chains: what they ask for, and how they are written."""

import pytest
import torch

from ldm.diffusion.guidance import CFG, CFGPlusPlus, InstructPix2Pix, composed, divided
from ldm.diffusion.guidances.catalogue import GUIDANCES, canonical_guidance, options_of, read_guidance
from ldm.diffusion.guidances.chain import Chain
from ldm.errors import UserError

ASKED = {
    "cfg": ("uncond", "cond"),
    "cfg_rescale": ("uncond", "cond"),
    "cfgpp": ("uncond", "cond"),
    "cfg_zero_star": ("uncond", "cond"),
    "apg": ("uncond", "cond"),
    "apg_mix": ("uncond", "cond"),
    "tcfg": ("uncond", "cond"),
    "perp_neg": ("uncond", "cond", "empty"),
    "mambo": ("uncond", "cond"),
    "dynamic_thresholding": ("uncond", "cond"),
    "fdg": ("uncond", "cond"),
    "autoguidance": ("cond:worse", "cond"),
    "autoguidance+apg+dynamic_thresholding": ("cond:worse", "cond"),
}


@pytest.mark.parametrize("text", ASKED)
def test_it_asks_for_each_branch_once_and_at_scale_1_for_the_text_alone(text):
    parts = read_guidance(text)
    assert Chain(CFG(5.0), parts).branches == ASKED[text]
    off = Chain(CFG(1.0), parts)
    assert off.branches == ("cond",)
    outputs, x = {"cond": torch.ones(1, 1, 2, 2)}, torch.zeros(1, 1, 2, 2)
    denoise = off(lambda *_: dict(outputs), lambda output, x, sigma: output)
    assert torch.equal(denoise(x, torch.tensor(1.0)).x0, outputs["cond"])


def test_another_way_to_combine_goes_in_the_names_place():
    outputs = {name: torch.full((1, 1, 2, 2), float(k)) for k, name in enumerate(("cond", "uncond", "image"))}
    for plain in (CFGPlusPlus(0.6), InstructPix2Pix(5.0, 2.0)):
        x0s = [
            guidance(lambda *_: dict(outputs), lambda output, x, sigma: output)(
                outputs["cond"], torch.ones(())
            )
            for guidance in (plain, Chain(plain, read_guidance("cfg")))
        ]
        assert torch.equal(x0s[0].x0, x0s[1].x0)
        assert torch.equal(x0s[0].anchor, x0s[1].anchor)
        assert Chain(plain, ()).branches == plain.branches


def test_a_branch_of_a_composed_prompt_is_composed_in_its_own_way():
    values = {"uncond": 1.0, "cond": 2.0, "cond_1": 5.0, "cond:worse": 3.0, "cond_1:worse": 7.0}
    asked = []

    def network(x, sigma, names):
        asked.append(names)
        return {name: torch.full((1, 1, 1, 1), values[name]) for name in names}

    predict = composed(network, torch.tensor([[0.5, 2.0]]))
    x = torch.zeros(1, 1, 1, 1)
    got = predict(x, torch.ones(()), ("cond:worse", "cond"))
    assert list(got) == ["cond:worse", "cond"]
    assert float(got["cond"]) == 1 + 0.5 * (2 - 1) + 2 * (5 - 1)
    assert float(got["cond:worse"]) == 1 + 0.5 * (3 - 1) + 2 * (7 - 1)
    assert set(asked[0]) == {"uncond", "cond", "cond_1", "cond:worse", "cond_1:worse"}


def test_another_network_answers_its_own_branches():
    def network(value):
        return lambda x, sigma, names: {name: (value, name) for name in names}

    predict = divided(network("own"), {"worse": network("other")})
    got = predict(None, None, ("cond:worse", "uncond", "cond", "cond:perturbed"))
    assert list(got) == ["cond:worse", "uncond", "cond", "cond:perturbed"]
    assert [value for value, _ in got.values()] == ["other", "own", "own", "own"]


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("APG", "apg:eta=0,r=0,momentum=0,space=x0"),
        ("apg:eta=0.5, r=5", "apg:eta=0.5,r=5,momentum=0,space=x0"),
        ("interval:0.2,0.8 + CFG-Zero*", "cfg_zero_star:zero_init=1+interval:start=0.2,stop=0.8"),
        ("cfg rescale:0.7+tcfg", "tcfg+cfg_rescale:phi=0.7"),
        ("cfgpp", "cfgpp"),
        ("cfgpp:strength=1e-3", "cfgpp:strength=0.001"),
        ('Auto-guidance:"a,b+c=d/model"', 'autoguidance:model="a,b+c=d/model"'),
        ("autoguidance:C:\\models\\old,hash=0123", "autoguidance:model=C:\\models\\old,hash=0123"),
    ],
)
def test_a_chain_has_one_spelling(written, canonical):
    assert canonical_guidance(written) == canonical
    assert canonical_guidance(canonical) == canonical


@pytest.mark.parametrize("name", GUIDANCES)
def test_every_name_is_written_with_its_options_as_it_is_read(name):
    (part,) = read_guidance(name)
    assert read_guidance(canonical_guidance(name)) == (part,)
    assert part.name == name
    assert "20" in part.source or "diffusers" in part.source
    for key, option in options_of(type(part)).items():
        assert option.allowed, key


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("apgg", "unknown guidance 'apgg': did you mean apg"),
        ("", "unknown guidance"),
        ("apg+", "unknown guidance ''"),
        ("apg:etta=2", "'etta', which it has not: it takes eta (a number from -10 to 10), r"),
        ("apg:eta=70", "guidance apg: eta=70 is not allowed: it must be a number from -10 to 10"),
        ("apg:r=many", "r=many is not allowed"),
        ("apg:eta=nan", "eta=nan is not allowed"),
        ("apg:eta=1,eta=2", "given twice"),
        ("apg:space=latent", "must be one of x0, output"),
        ("cfg_zero_star:1.5", "must be a whole number from 0 to 100"),
        ("tcfg:3", "it takes no options"),
        ("apg+fdg", "guidances apg and fdg both combine the branches"),
        ("tcfg+tcfg", "tcfg is given twice"),
        ("autoguidance:model=", "model= is not allowed"),
    ],
)
def test_what_is_wrong_is_told(text, said):
    with pytest.raises(UserError) as caught:
        read_guidance(text)
    assert said in str(caught.value)
