"""Sections of a recipe must agree with each other and with the DeepSpeed JSON."""

import json
from pathlib import Path

import pytest

from phi3v.config import (
    RunConfig,
    check,
    default_deepspeed,
    load_deepspeed,
    load_recipe,
    metric_names,
    pattern_fields,
)
from phi3v.errors import ConfigError

RECIPE = """
run: {out: runs/demo}
model: {path: models/tiny}
data: {shards: shards/demo}
optim: {lr: 1.0e-4}
train: {max_steps: 10}
"""
PATTERN = "eval.pattern='Product: {title}, Full Price: {price:float}'"


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
        ("optim.warmup_steps=99", "train.max_steps=null", "train.epochs=1"),
        ("model.freeze=[vision, language]", "optim.projector_lr=1e-5"),
        (PATTERN, "eval.metrics=[exact_match, parse_rate, title_exact_match_unseen, price_mape]"),
    ],
)
def test_recipes_that_agree_are_accepted(recipe: Path, overrides: tuple[str, ...]) -> None:
    check_recipe(recipe, *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("optim.warmup_steps=10",),
            "optim.warmup_steps 10 must be below train.max_steps 10; use at most 9",
        ),
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
            ("eval.metrics=[parse_rate]",),
            "eval.metrics holds 'parse_rate'; it measures fields of the answer, so eval.pattern "
            "must name them",
        ),
        (
            ("eval.metrics=[title_accuracy]",),
            "eval.metrics holds 'title_accuracy'; it measures fields of the answer, so "
            "eval.pattern must name them",
        ),
        (
            ("eval.metrics=[bleu]",),
            "eval.metrics holds 'bleu'; known are exact_match",
        ),
        (
            (PATTERN, "eval.metrics=[titel_accuracy]"),
            "eval.metrics holds 'titel_accuracy'; did you mean 'title_accuracy'?",
        ),
        (
            (PATTERN, "eval.metrics=[title_mape]"),
            "eval.metrics holds 'title_mape'; it measures numbers, so write {title:float} in "
            "eval.pattern 'Product: {title}, Full Price: {price:float}'",
        ),
        (
            ("eval.pattern='Product'",),
            "eval.pattern must name a field, such as {title}, got 'Product'",
        ),
        (("eval.pattern='{a} {a}'",), "eval.pattern names {a} twice; keep one"),
        (("eval.pattern='{}'",), "eval.pattern holds {}; write {name} or {name:float}"),
        (("eval.pattern='{a:int}'",), "eval.pattern holds {a:int}; write {name} or {name:float}"),
        (("eval.pattern='{a!r}'",), "eval.pattern holds {a!r}; write {name} or {name:float}"),
        (
            ("eval.pattern='{a'",),
            "eval.pattern cannot be read, got '{a': expected '}' before end of string",
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


def test_a_pattern_names_its_fields_in_order() -> None:
    assert pattern_fields("A: {a}, {{x}} {b:float}") == {"a": str, "b": float}


def test_a_pattern_decides_which_metrics_there_are() -> None:
    assert metric_names(None) == ["exact_match"]
    assert metric_names("{price:float}") == [
        "exact_match",
        "parse_rate",
        "price_accuracy",
        "price_exact_match",
        "price_exact_match_unseen",
        "price_mape",
    ]
