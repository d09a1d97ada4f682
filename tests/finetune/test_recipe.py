"""Recipes of fine-tuning: defaults, then YAML, then flags; each option has a flag; faults are one line."""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from ldm.cli import main
from ldm.cli.parser import Parser, dashes
from ldm.errors import UserError
from ldm.finetune.flags import add_recipe_flags, find_recipe, read_finetune_recipe, shipped_recipes
from ldm.finetune.recipe import FinetuneRecipe

ROOT = Path(__file__).parents[2]
NEEDED = ["--train_data_dir", "pictures", "--output_dir", "run", "--max_train_steps", "5"]


def parse(*argv: str) -> FinetuneRecipe:
    parser = Parser("ldm finetune")
    add_recipe_flags(parser)
    return read_finetune_recipe(parser.parse_args(dashes(argv)))


def write(folder: Path, **values: object) -> str:
    (folder / "mine.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "mine.yaml")


# --- where values come from ------------------------------------------------------------------------------


def test_flags_go_before_yaml_and_yaml_before_defaults(tmp_path):
    config = write(tmp_path, rank=32, learning_rate=5e-5, train_data_dir="there", random_flip=True)
    recipe = parse("--config", config, "--output_dir", "run", "--rank", "64", "--no-random_flip")
    assert (recipe.rank, recipe.learning_rate, recipe.train_batch_size) == (64, 5e-5, 1)
    assert recipe.train_data_dir == Path("there")
    assert recipe.random_flip is False
    recipe = parse("--config", config, "--output_dir", "run", "--train_data_dir", "here")
    assert (recipe.rank, recipe.random_flip, recipe.train_data_dir) == (32, True, Path("here"))


VALUES: dict[str, tuple[list[str], Any]] = {
    "timestep_sampling": (["logit_normal"], "logit_normal"),
    "timestep_histogram": (["1", "2.5"], (1.0, 2.5)),
    "lora_targets": (["to_k", "ff.net.2"], ("to_k", "ff.net.2")),
    "validation_prompts": (["a boat", "the sea"], ("a boat", "the sea")),
    "class_prompt": (["a dog", "a cat"], ("a dog", "a cat")),
    "resolution": (["768,512"], (512, 768)),
    "mode": (["full"], "full"),
    "prediction_type": (["v_prediction"], "v_prediction"),
    "missing_caption": (["skip"], "skip"),
    "lr_scheduler": (["cosine"], "cosine"),
    "loss_type": (["huber"], "huber"),
    "variance": (["hybrid"], "hybrid"),
    "mixed_precision": (["bf16"], "bf16"),
    "on_nan": (["skip"], "skip"),
    "distributed": (["fsdp"], "fsdp"),
    "report_to": (["tensorboard"], "tensorboard"),
    "preprocess_options": (["low=50", "high=90"], ("low=50", "high=90")),
    "max_timestep": (["900"], 900),
    "optimizer": (["lion"], "lion"),
    "base_model_precision": (["nf4-bnb"], "nf4-bnb"),
    "validation_lora_scales": (["0.5", "1"], (0.5, 1.0)),
    "max_train_hours": (["0.5"], 0.5),
    "adapter_type": (["loha"], "loha"),
    "block_rank": (["down.0=4", "mid=8"], ("down.0=4", "mid=8")),
    "block_lr": (["down.0=1e-4"], ("down.0=1e-4",)),
    "optimizer_args": (["d_coef=2", "betas=0.9,0.99"], ("d_coef=2", "betas=0.9,0.99")),
}
BESIDE = {  # what else must be given
    "timestep_histogram": ["--timestep_sampling", "importance"],
    "class_data_dir": ["--class_prompt", "sea"],
    "placeholder_token": ["--mode", "textual_inversion", "--initializer_token", "cat"],
    "initializer_token": ["--mode", "textual_inversion", "--placeholder_token", "<it>"],
    "num_vectors": [
        "--mode",
        "textual_inversion",
        "--placeholder_token",
        "<it>",
        "--initializer_token",
        "cat",
    ],
    "inpainting": ["--mode", "full"],
    "unmasked_weight": ["--masked_loss"],
    "control_data_dir": ["--mode", "controlnet"],
    "preprocess": ["--mode", "controlnet"],
    "preprocess_options": ["--mode", "controlnet", "--preprocess", "canny"],
    "image_encoder": ["--mode", "image_prompt"],
    "image_dropout": ["--mode", "image_prompt", "--image-encoder", "folder"],
}


def example(name: str) -> tuple[list[str], Any]:
    """Words for a flag that are not its default, and the value that they should become."""
    field = FinetuneRecipe.model_fields[name]
    kinds = {field.annotation, *get_args(field.annotation)}
    if name in VALUES:
        return VALUES[name]
    if bool in kinds:
        return [], not field.default
    if float in kinds or any("float" in str(kind) for kind in kinds):
        return ["0.25"], 0.25
    if int in kinds:
        return ["3"], 3
    return ["some"], Path("some") if Path in kinds else "some"


@pytest.mark.parametrize("name", sorted(FinetuneRecipe.model_fields.keys() - {"masks"}))
def test_every_option_has_a_flag_that_reaches_the_recipe(name):
    words, expected = example(name)
    for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
        if expected is False:
            flag = flag.replace("--", "--no-", 1)
        recipe = parse(*NEEDED, *BESIDE.get(name, []), flag, *words)
        assert getattr(recipe, name) == expected
        assert type(getattr(recipe, name)) is type(expected)


def test_masks_are_set_in_yaml(tmp_path):
    shares = {"rectangles": 0.5, "strokes": 0.5, "whole": 0, "none": 0}
    config = write(tmp_path, masks=shares, inpainting=True, mode="full")
    assert parse("--config", config, *NEEDED).masks.shares == (0.5, 0.5, 0, 0)
    with pytest.raises(UserError, match=r"mine\.yaml: masks: .*sum to 1\.5"):
        parse("--config", write(tmp_path, masks=shares | {"whole": 0.5}), *NEEDED)


@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        ("--pretrained_model_name_or_path", "model", "some"),
        ("-m", "model", "some"),
        ("--pretrained_vae_model_name_or_path", "vae", "some"),
        ("--instance_data_dir", "train_data_dir", Path("some")),
        ("--validation_prompt", "validation_prompts", ("some",)),
        ("-o", "output_dir", Path("some")),
        ("--num_vectors_per_token", "num_vectors", 3),
        ("--lora_rank", "rank", 3),
        ("--optimizer_type", "optimizer", "lion"),
    ],
)
def test_names_of_other_scripts_are_understood(flag, name, value):
    words = "some" if value in ("some", ("some",), Path("some")) else str(value)
    recipe = parse(*NEEDED, *BESIDE.get(name, []), flag, words)
    assert getattr(recipe, name) == value


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/finetune_*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_found_by_name(path):
    word = BESIDE["num_vectors"] if "inversion" in path.stem else []
    word = ["--image_encoder", "some"] if "image_prompt" in path.stem else word
    for name in (path.stem, path.stem.removeprefix("finetune_"), path.name, str(path)):
        recipe = parse("--config", name, *NEEDED, *word)
        for key, value in yaml.safe_load(path.read_text()).items():
            held = getattr(recipe, key)
            held = held.model_dump() if isinstance(value, dict) else held
            assert held == value or key == "max_train_steps"
    assert path.stem in shipped_recipes()
    assert path.read_text().startswith("#")


def test_there_are_recipes_of_every_mode():
    modes = {yaml.safe_load(find_recipe(name).read_text())["mode"] for name in shipped_recipes()}
    assert modes == {"lora", "full", "textual_inversion", "controlnet", "image_prompt"}


def test_yaml_reads_a_bare_no_as_false(tmp_path):
    (tmp_path / "mine.yaml").write_text("mixed_precision: no\nresume_from_checkpoint: no\n")
    recipe = parse("--config", str(tmp_path / "mine.yaml"), *NEEDED)
    assert (recipe.mixed_precision, recipe.resume_from_checkpoint) == ("no", "no")


# --- faults ----------------------------------------------------------------------------------------------

WORD = ["--mode", "textual_inversion", "--placeholder_token", "<it>", "--initializer_token", "cat"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([*NEEDED, "--rank", "0"], "rank: Input should be greater than or equal to 1 (got '0')"),
        ([*NEEDED, "--rank", "many"], "rank: Input should be a valid integer"),
        ([*NEEDED, "--learning_rate", "-1"], "learning_rate: Input should be greater than 0"),
        ([*NEEDED, "--learning_rate", "nan"], "learning_rate: "),
        ([*NEEDED, "--learning_rate", "inf"], "learning_rate: "),
        ([*NEEDED, "--resolution", "100"], "resolution: Input should be a multiple of 8 (got '100')"),
        ([*NEEDED, "--resolution", "32"], "resolution: Input should be greater than or equal to 64"),
        ([*NEEDED, "--resolution", "512,100"], "resolution: Input should be a multiple of 8 (got '100')"),
        ([*NEEDED, "--resolution", "512,512"], "resolution: give each resolution once"),
        ([*NEEDED, "--resolution", "512,"], "resolution: Input should be a valid integer"),
        ([*NEEDED, "--held_out", "1"], "held_out: Input should be less than 1"),
        ([*NEEDED, "--caption_dropout", "2"], "caption_dropout: "),
        ([*NEEDED, "--mode", "dreambooth"], "invalid choice: 'dreambooth'"),
        ([*NEEDED, "--ranck", "4"], "unrecognized arguments: --ranck 4; did you mean --rank?"),
        ([*NEEDED, "--rank"], "--rank"),
        (
            [*NEEDED, "--max_timestep", "3", "--min_timestep", "5"],
            "max_timestep 3 must be above min_timestep 5",
        ),
        (
            [*NEEDED, "--timestep_sampling", "importance"],
            "timestep_sampling: importance and timestep_histogram",
        ),
        ([*NEEDED, "--class_data_dir", "x"], "class_data_dir needs class_prompt"),
        (
            [*NEEDED, "--mode", "full", "--rank", "8"],
            "rank is not allowed in mode full: only lora can use it",
        ),
        ([*NEEDED, "--mode", "full", "--use_dora"], "use_dora is not allowed in mode full"),
        ([*NEEDED, "--placeholder_token", "<it>"], "placeholder_token is not allowed in mode lora"),
        ([*NEEDED, *WORD, "--train_text_encoder"], "only lora and full can use it"),
        ([*NEEDED, *WORD, "--inpainting"], "choose lora or full"),
        ([*NEEDED, *WORD[:4]], "textual_inversion needs initializer_token"),
        ([*NEEDED, *WORD[:2]], "textual_inversion needs placeholder_token"),
        (NEEDED[2:], "--train_data_dir: give a folder"),
        (NEEDED[:2], "--output_dir: give a folder"),
        ([*NEEDED, "--config", "nowhere.yaml"], "--config nowhere.yaml: no such file, nor one of finetune_"),
    ],
)
def test_a_wrong_option_is_named_in_one_line(argv, said, capsys):
    try:
        code = main(["finetune", *argv])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rnk: 4", "mine.yaml: rnk: there is no such key; did you mean rank?"),
        ("rank: [4]", "mine.yaml: rank: "),
        ("mode: dreambooth", "mine.yaml: mode: "),
        ("- rank", "is not a recipe"),
        ("rank: 4: 5", "is not valid YAML"),
        ("\x00", "is not valid YAML"),
        ("run: {seed: 4}", "mine.yaml: run: there is no such key"),
    ],
)
def test_a_wrong_recipe_names_its_file_and_key(tmp_path, capsys, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    assert main(["finetune", *NEEDED, "--config", str(tmp_path / "mine.yaml")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_one_resolution_is_kept_as_states_have_it():
    kept = {512: 512, "512": 512, "768,512": [512, 768], (512, 768): [512, 768], None: None}
    for given, written in kept.items():
        recipe = FinetuneRecipe(train_data_dir="a", output_dir="b", resolution=given)
        assert recipe.model_dump(mode="json")["resolution"] == written


def test_a_recipe_is_frozen_and_ends():
    recipe = parse(*NEEDED)
    with pytest.raises(ValueError, match="frozen"):
        recipe.rank = 8
    assert parse(*NEEDED[:4]).num_train_epochs == 100  # without steps or minutes it ends by epochs


# --- help ------------------------------------------------------------------------------------------------


def test_help_tells_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", "--help"])
    assert stopped.value.code == 0
    said = "".join(capsys.readouterr().out.split())  # lines break anywhere
    for name, field in FinetuneRecipe.model_fields.items():
        if name != "masks":
            assert f"--{name.replace('_', '-')}" in said
            assert "".join(field.description.split()) in said
    assert "(default:0.0001)" in said
    assert "finetune_lora" in said


def test_the_guide_names_every_flag_and_its_commands_are_understood():
    said = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
    named = {flag.replace("-", "_").removeprefix("no_") for flag in re.findall(r"--([a-z][a-z0-9_-]+)", said)}
    assert FinetuneRecipe.model_fields.keys() - named == {"masks"}
    parser = Parser("ldm finetune")
    add_recipe_flags(parser)
    blocks = re.findall(r"```\n(.*?)```", said, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("ldm finetune")]
    assert len(commands) == 6
    for command in commands:
        parser.parse_args(dashes(command[2:]))


def test_help_of_all_commands_is_instant():
    """No pydantic and no torch: help that takes seconds is not asked for."""
    code = (
        "import sys\nfrom ldm.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'pydantic', 'torch', 'yaml', 'accelerate', 'numpy'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.splitlines()[-1] == "[]"
    assert "finetune" in ran.stdout
    code = (
        code.replace("['--help']", "['finetune', '--help']")
        .replace("'pydantic', ", "")
        .replace("'yaml', ", "")
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_flags_that_are_not_given_are_not_in_the_namespace():
    parser = argparse.ArgumentParser()
    add_recipe_flags(parser)
    assert vars(parser.parse_args([])) == {"config": None}
