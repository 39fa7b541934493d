"""Sections of a recipe must agree with each other and with the DeepSpeed JSON."""

import json
from pathlib import Path

import pytest

from phi3v.config import RunConfig, check, default_deepspeed, load_deepspeed, load_recipe
from phi3v.errors import ConfigError

RECIPE = """
run: {out: runs/demo}
model: {path: models/tiny}
data: {shards: shards/demo}
optim: {lr: 1.0e-4}
train: {max_steps: 10}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "demo.yaml"
    path.write_text(RECIPE)
    return path


def check_recipe(recipe: Path, *overrides: str) -> None:
    check(
        load_recipe(RunConfig, recipe, overrides),
        load_deepspeed(default_deepspeed(has_cuda=False), 2),
    )


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("optim.warmup_steps=9", "optim.weight_decay=0.1"),
        ("optim.warmup_steps=99",),
        ("model.freeze=[vision, language]", "optim.projector_lr=1e-5"),
        ("model.offload_activations=true", "model.checkpointing=full"),
        ("model.offload_activations=true", "model.vision_checkpointing=full"),
    ],
)
def test_recipes_that_agree_are_accepted(recipe: Path, overrides: tuple[str, ...]) -> None:
    check_recipe(recipe, *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("model.freeze=[head, vision, projector, language, embeddings]",),
            "model.freeze holds all modules, vision, projector, language, embeddings, head, so "
            "nothing is left to train; remove at least one",
        ),
        (
            ("model.freeze=[vision]", "optim.vision_lr=2e-6"),
            "optim.vision_lr is 2e-06 but model.freeze holds 'vision'; remove one of the two",
        ),
        (
            ("model.freeze=[vision]", "optim.vision_layer_decay=0.9"),
            "optim.vision_layer_decay is 0.9 but model.freeze holds 'vision'; remove one of the "
            "two",
        ),
        (
            ("model.offload_activations=true", "model.checkpointing=selective"),
            "model.offload_activations is true, but checkpointing is 'selective' and that of the "
            "tower 'selective'; only full checkpointing keeps what can wait in the host's memory, "
            "so set it to full",
        ),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(
    recipe: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_recipe(recipe, *overrides)
    assert str(caught.value) == message


def test_decoupled_weight_decay_needs_an_optimizer_that_decouples_it(recipe: Path) -> None:
    content = json.loads(default_deepspeed(has_cuda=False).read_text())
    content["optimizer"] = {"type": "Adagrad"}
    path = recipe.with_name("adagrad.json")
    path.write_text(json.dumps(content))
    cfg = load_recipe(RunConfig, recipe, ["optim.weight_decay=0.1"])
    with pytest.raises(ConfigError) as caught:
        check(cfg, load_deepspeed(path, 2))
    assert str(caught.value) == (
        f"optim.weight_decay 0.1 is decoupled decay, but the Adagrad of {path} adds decay to the "
        "gradient; set optimizer.type to AdamW there, or optim.weight_decay to 0"
    )
