"""From the command line to a checked configuration: which DeepSpeed JSON a run takes."""

import json
from pathlib import Path
from unittest import mock

import pytest

from phi3v.config import default_deepspeed
from phi3v.errors import ConfigError
from phi3v.training.ranks import Ranks
from phi3v.training.start import load_run

RECIPES = default_deepspeed(has_cuda=True).parents[1] / "launch" / "recipes"
RANKS = Ranks(0, 2, 0, 2)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    values = {
        "run": {"out": "run"},
        "model": {"path": "model"},
        "data": {"shards": "shards"},
        "optim": {"lr": 1e-3},
        "train": {"max_steps": 3},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(values), encoding="utf-8")
    return tmp_path / "run.yaml"


def taken(recipe: Path, *overrides: str, has_cuda: bool) -> str:
    with mock.patch("torch.cuda.is_available", lambda: has_cuda):
        return load_run(recipe, overrides, RANKS)[1].path.name


@pytest.mark.parametrize(
    ("overrides", "cpu", "cuda"),
    [
        ([], "zero3_cpu.json", "zero3.json"),
        (["deepspeed=ds_configs/zero2.json"], "zero2.json", "zero2.json"),
        (
            ["deepspeed.cpu=ds_configs/zero1.json", "deepspeed.cuda=ds_configs/zero2.json"],
            "zero1.json",
            "zero2.json",
        ),
    ],
)
def test_a_recipe_names_one_json_or_one_for_each_device(
    recipe: Path, overrides: list[str], cpu: str, cuda: str
) -> None:
    assert taken(recipe, *overrides, has_cuda=False) == cpu
    assert taken(recipe, *overrides, has_cuda=True) == cuda


def test_a_json_for_one_device_alone_is_refused(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="missing key 'deepspeed.cuda'"):
        load_run(recipe, ["deepspeed.cpu=ds_configs/zero1.json"], RANKS)


@pytest.mark.parametrize("name", ["demo.yaml", "digits.yaml"])
def test_a_tiny_model_has_the_same_batch_on_every_device(name: str) -> None:
    """With zero3.json it would be eight times as many packs a step on a GPU, and as much time."""
    for has_cuda in (False, True):
        with mock.patch("torch.cuda.is_available", lambda has_cuda=has_cuda: has_cuda):
            _, ds = load_run(RECIPES / name, [], RANKS)
        assert (ds.train_batch_size, ds.bf16) == (8, has_cuda)


def test_keys_of_the_json_are_set_beside_those_of_the_recipe(recipe: Path) -> None:
    cfg, ds = load_run(recipe, ["deepspeed.train_batch_size=4", "optim.lr=2e-3"], RANKS)
    assert (ds.train_batch_size, cfg.optim.lr, cfg.deepspeed) == (4, 2e-3, None)
