"""Which parameters are trained, with what decay, and the shape of their learning rates."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from phi3v.config import MODULES, RunConfig, build_recipe
from phi3v.model import Phi3VForCausalLM
from phi3v.training.optimizer import (
    freeze,
    learning_rates,
    lr_factor,
    module_of,
    parameter_groups,
)
from phi3v.training.zero import set_learning_rates

VISION = "model.vision_embed_tokens."
TOWER = f"{VISION}img_processor.vision_model."


def recipe(**optim: Any) -> RunConfig:
    values = {
        "run": {"out": "runs/demo"},
        "model": {"path": "models/tiny"},
        "data": {"shards": "shards/demo"},
        "optim": {"lr": 1e-3, "weight_decay": 0.1} | optim,
        "train": {"max_steps": 1000},
    }
    return build_recipe(RunConfig, values, Path("demo.yaml"), [])


@pytest.fixture
def model(tiny_model: Path) -> Phi3VForCausalLM:
    return Phi3VForCausalLM.from_pretrained(tiny_model)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# --- modules ---


@pytest.mark.parametrize(
    ("name", "module"),
    [
        (f"{TOWER}embeddings.class_embedding", "vision"),
        (f"{TOWER}encoder.layers.0.mlp.fc1.bias", "vision"),
        (f"{VISION}glb_GN", "projector"),
        (f"{VISION}sub_GN", "projector"),
        (f"{VISION}img_projection.2.weight", "projector"),
        ("model.embed_tokens.weight", "embeddings"),
        ("model.layers.1.self_attn.qkv_proj.weight", "language"),
        ("model.norm.weight", "language"),
        ("lm_head.weight", "head"),
    ],
)
def test_a_parameter_belongs_to_its_module(model: Phi3VForCausalLM, name: str, module: str) -> None:
    assert module_of(name) == module
    assert name in dict(model.named_parameters())


def test_every_parameter_has_a_module_and_every_module_has_some(model: Phi3VForCausalLM) -> None:
    assert {module_of(name) for name, _ in model.named_parameters()} == set(MODULES)


# --- groups ---


def test_groups_hold_each_trained_parameter_once(model: Phi3VForCausalLM) -> None:
    grouped = [id(p) for group in parameter_groups(model, recipe()) for p in group["params"]]
    expected = {id(p) for p in trained(model).values()}
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == expected
    unused = [p for name, p in model.named_parameters() if id(p) not in expected]
    assert unused, "the tower's last layer is never computed, so it is not trained"


def test_only_matrices_and_token_embeddings_decay(model: Phi3VForCausalLM) -> None:
    names = {id(p): name for name, p in trained(model).items()}
    still = [
        names[id(p)]
        for group in parameter_groups(model, recipe())
        for p in group["params"]
        if group["weight_decay"] == 0
    ]
    ends = ("norm.weight", "norm1.weight", "norm2.weight", "layrnorm.weight", ".bias", "_GN")
    places = ("class_embedding", "position_embedding.weight")
    expected = [n for n in names.values() if n.endswith((*ends, *places))]
    assert sorted(still) == sorted(expected)
    assert {f"{VISION}glb_GN", f"{VISION}sub_GN", "model.norm.weight"} < set(still)


def test_a_parameter_divided_by_zero3_decays_by_its_whole_shape(model: Phi3VForCausalLM) -> None:
    def decays() -> dict[int, float]:
        groups = parameter_groups(model, recipe())
        return {id(p): group["weight_decay"] for group in groups for p in group["params"]}

    before = decays()
    for parameter in model.parameters():  # as deepspeed.zero.Init does
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert decays() == before


def test_groups_carry_their_modules_rate_and_the_decay(model: Phi3VForCausalLM) -> None:
    cfg = recipe(vision_lr=2e-6, head_lr=5e-4)
    groups = parameter_groups(model, cfg)
    assert {(g["name"], g["lr"]) for g in groups} == {
        ("vision", 2e-6),
        ("projector", 1e-3),
        ("language", 1e-3),
        ("embeddings", 1e-3),
        ("head", 5e-4),
    }
    assert {g["weight_decay"] for g in groups} == {0.0, 0.1}
    assert len(groups) == 2 + 2 + 2 + 1 + 1, "embeddings and head have nothing that does not decay"


def test_each_tower_layer_learns_slower_than_the_one_above(model: Phi3VForCausalLM) -> None:
    """The tower has 4 layers, of which the lower 3 are used."""
    names = {id(p): name for name, p in trained(model).items()}
    groups = parameter_groups(model, recipe(vision_lr=1e-4, vision_layer_decay=0.5))
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    for layer, expected in enumerate((0.25, 0.5, 1.0)):
        prefix = f"{TOWER}encoder.layers.{layer}."
        assert {scales.pop(name) for name in [*scales] if name.startswith(prefix)} == {expected}
    below = {name for name, scale in scales.items() if scale < 1}
    assert {name.removeprefix(TOWER) for name in below} == {
        "embeddings.class_embedding",
        "embeddings.patch_embedding.weight",
        "embeddings.position_embedding.weight",
        "pre_layrnorm.weight",
        "pre_layrnorm.bias",
    }
    assert {scales[name] for name in below} == {0.125}
    assert all(g["lr"] == 1e-4 * g["lr_scale"] for g in groups if g["name"] == "vision")


def test_a_step_sets_each_group_its_share_of_its_modules_rate(model: Phi3VForCausalLM) -> None:
    cfg = recipe(vision_lr=1e-4, vision_layer_decay=0.5, schedule="linear")
    optimizer = torch.optim.AdamW(parameter_groups(model, cfg))
    for step in (1, 6):
        set_learning_rates(SimpleNamespace(optimizer=optimizer), learning_rates(step, 10, cfg))
        for group in optimizer.param_groups:
            peak = 1e-4 * group["lr_scale"] if group["name"] == "vision" else 1e-3
            assert group["lr"] == pytest.approx(peak * (1 - step / 10))


@pytest.mark.parametrize("frozen", [("vision",), ("language", "embeddings", "head"), MODULES[1:]])
def test_frozen_modules_are_in_no_group(model: Phi3VForCausalLM, frozen: tuple[Any, ...]) -> None:
    before = set(trained(model))
    freeze(model, frozen)
    assert set(trained(model)) == {name for name in before if module_of(name) not in frozen}
    groups = parameter_groups(model, recipe())
    assert {group["name"] for group in groups} == set(MODULES) - set(frozen)
    assert all(p.requires_grad for group in groups for p in group["params"])


# --- learning rates ---


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, RunConfig]:
    """A length in steps, and a recipe whose warmup is shorter."""
    total = draw(st.integers(2, 400))
    cfg = recipe(
        schedule=draw(st.sampled_from(["cosine", "linear", "constant"])),
        warmup_steps=draw(st.integers(0, total - 1)),
        min_lr_ratio=draw(st.floats(0, 1)),
    )
    return total, cfg


@given(schedules())
def test_rates_rise_in_a_line_and_then_never_again(schedule: tuple[int, RunConfig]) -> None:
    total, cfg = schedule
    warmup = cfg.optim.warmup_steps
    factors = [lr_factor(step, total, cfg) for step in range(1, total + 1)]
    rise, fall = factors[:warmup], factors[warmup:]
    assert rise == [step / warmup for step in range(1, warmup + 1)]
    assert all(a >= b for a, b in zip(fall, fall[1:], strict=False))
    assert all(cfg.optim.min_lr_ratio <= factor <= 1 for factor in fall)


@given(schedules())
def test_the_last_step_has_the_smallest_rate(schedule: tuple[int, RunConfig]) -> None:
    total, cfg = schedule
    expected = 1.0 if cfg.optim.schedule == "constant" else cfg.optim.min_lr_ratio
    assert lr_factor(total, total, cfg) == pytest.approx(expected, abs=1e-12)


def test_half_way_down_is_half_way_between_peak_and_minimum() -> None:
    for shape in ("cosine", "linear"):
        cfg = recipe(schedule=shape, warmup_steps=20, min_lr_ratio=0.1)
        assert lr_factor(20, 120, cfg) == 1.0
        assert lr_factor(70, 120, cfg) == pytest.approx(0.55)
    quarter = 0.1 + 0.9 * 0.853553390593  # (1 + cos(pi / 4)) / 2
    assert lr_factor(45, 120, recipe(warmup_steps=20, min_lr_ratio=0.1)) == pytest.approx(quarter)


@given(st.integers(1, 400), st.floats(0, 1, exclude_max=True))
def test_a_warm_up_by_ratio_is_that_share_of_any_run_and_shorter(total: int, ratio: float) -> None:
    cfg = recipe(warmup_ratio=ratio)
    warmup = cfg.optim.warmup(total)
    assert warmup == min(math.ceil(ratio * total), total - 1)
    by_steps = recipe(warmup_steps=warmup)
    assert [lr_factor(step, total, cfg) for step in range(1, total + 1)] == [
        lr_factor(step, total, by_steps) for step in range(1, total + 1)
    ]


@pytest.mark.parametrize(("steps", "warmup"), [(6, 1), (50, 2), (100, 3), (6250, 188)])
def test_three_percent_of_some_lengths(steps: int, warmup: int) -> None:
    assert recipe(warmup_ratio=0.03).optim.warmup(steps) == warmup


def test_each_trained_module_has_its_own_rate() -> None:
    values = {"vision_lr": 2e-6, "schedule": "linear", "warmup_steps": 4}
    cfg = recipe(**values)
    assert learning_rates(1, 10, cfg) == {
        "vision": 5e-7,
        "projector": 2.5e-4,
        "language": 2.5e-4,
        "embeddings": 2.5e-4,
        "head": 2.5e-4,
    }
    assert learning_rates(10, 10, cfg)["vision"] == 0


def test_a_frozen_module_has_no_rate() -> None:
    tree = {"run": {"out": "a"}, "model": {"path": "b", "freeze": ["vision", "head"]}}
    tree |= {"data": {"shards": "c"}, "optim": {"lr": 1e-3}, "train": {"max_steps": 10}}
    cfg = build_recipe(RunConfig, tree, Path("demo.yaml"), [])
    assert learning_rates(1, 10, cfg).keys() == {"projector", "language", "embeddings"}
