"""The shipped run recipes: read, checked against their DeepSpeed JSON and their dataset recipes."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from phi3v.config import (
    DatasetConfig,
    RunConfig,
    check,
    check_warmup,
    load_deepspeed,
    load_recipe,
)
from phi3v.config.schema import Checkpointing
from phi3v.evaluation.metrics import compile_pattern, find_metrics
from phi3v.geometry import Grid, image_tokens
from phi3v.processing.prompt import image_tags
from phi3v.training import start
from phi3v.training.memory import CARDS, Pack, evaluation_memory, gpu_memory
from phi3v.training.memory import PUBLISHED as PUBLISHED_SIZES
from tests.commands import ROOT

RECIPES = ROOT / "launch" / "recipes"
RUNS = sorted(p for p in RECIPES.glob("*.yaml") if "run" in yaml.safe_load(p.read_text()))
PUBLISHED = ("burberry", "docvqa", "llava", "nlvr2")
FULL_SIZE = (*PUBLISHED, "phi35")
ROTARY_LIMIT = 4096  # tokens, original_max_position_embeddings
RANKS = 8
SIDE = 12  # of the published model
TEXT = 100  # tokens that are left for words beside the largest pictures


@pytest.mark.parametrize("has_cuda", [False, True], ids=["cpu", "cuda"])
@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_a_run_recipe_fits_its_deepspeed_json_and_its_metrics_exist(
    path: Path, has_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "has_cuda", lambda: has_cuda)
    cfg = load_recipe(RunConfig, path, ())
    check(cfg, load_deepspeed(start.deepspeed_file(cfg), RANKS))
    find_metrics(cfg.eval.metrics, compile_pattern(cfg.eval.pattern) if cfg.eval.pattern else None)


@pytest.mark.parametrize("name", [*PUBLISHED, "phi35"])
@pytest.mark.parametrize("rows", [1_704, 200_000])
def test_a_recipe_of_a_published_model_ends_its_warm_up_on_few_rows_and_many(
    name: str, rows: int
) -> None:
    """Packs of several rows make a third of the steps: 6 of 64 packs for 1,704 rows."""
    cfg = load_recipe(RunConfig, RECIPES / f"{name}.yaml", ())
    assert cfg.train.epochs
    for packs in (rows, rows // 9):
        steps = -(-packs // 64) * cfg.train.epochs
        check_warmup(cfg, steps)
        assert cfg.optim.warmup(steps) <= 1 + 0.04 * steps


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_run_recipe_takes_up_what_its_dataset_recipe_makes(name: str) -> None:
    run = load_recipe(RunConfig, RECIPES / f"{name}.yaml", ())
    made = load_recipe(DatasetConfig, RECIPES / f"{name}_shards.yaml", ())
    assert (run.model.path, run.data.shards) == (made.model, made.out)
    assert made.split.validation > 0
    assert made.max_tokens is not None and made.max_tokens <= run.data.max_tokens


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_largest_pictures_fit_a_sample_and_a_pack(name: str) -> None:
    run = load_recipe(RunConfig, RECIPES / f"{name}.yaml", ())
    made = load_recipe(DatasetConfig, RECIPES / f"{name}_shards.yaml", ())
    (source,) = made.sources
    images = len(image_tags(source.user)) if source.user else 1
    assert made.num_crops is not None and made.max_tokens is not None
    tallest = Grid(made.num_crops, 1)  # the most tokens: a separator for every line
    assert images * image_tokens(tallest, SIDE) + TEXT <= made.max_tokens
    assert images * tallest.views <= run.data.max_views


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_run_of_a_published_model_fits_the_cards_it_is_for_and_uses_them(name: str) -> None:
    """With 15 % to spare; layers are computed a second time only where it would not fit without.

    The fullest pack and the longest prompts are taken. Answers are made a batch at a time up to the
    tokens where rotary factors change, and one by one beyond.
    """
    path = RECIPES / f"{name}.yaml"
    run = load_recipe(RunConfig, path, ())
    assert run.deepspeed
    ds = load_deepspeed(start.deepspeed_file(run), RANKS)
    pack = Pack(tokens=run.data.max_tokens, views=run.data.max_views)
    chosen = run.model.checkpointing, run.model.tower_checkpointing
    ways: tuple[tuple[Checkpointing, Checkpointing], ...]
    ways = (("none", "none"), ("none", "full"), ("full", "full"))
    room = 0.85 * CARDS["80 GB"]
    totals = {
        (decoder, tower): gpu_memory(
            PUBLISHED_SIZES, ds, replace(pack, checkpointing=decoder, tower_checkpointing=tower)
        ).total
        for decoder, tower in ways
    }
    assert chosen == next(way for way, total in totals.items() if total < room)
    longest = run.data.max_tokens + run.eval.max_new_tokens
    rows = min(run.eval.batch_rows, -(-run.eval.rows // RANKS))
    answering = max(
        evaluation_memory(PUBLISHED_SIZES, ds, rows, min(longest, ROTARY_LIMIT)),
        evaluation_memory(PUBLISHED_SIZES, ds, 1, longest),
    )
    assert answering < room
    told = f"fills {totals[chosen] / 1e9:.0f} of 85 GB, an evaluation {answering / 1e9:.0f}"
    assert told in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_recipe_says_what_it_is_and_what_to_type(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    head = [line for line in lines if line.startswith("#")]
    if path.stem.removesuffix("_shards") in PUBLISHED:
        name = path.stem.removesuffix("_shards")
        assert f"#   python launch/prepare.py launch/recipes/{name}_shards.yaml" in head
        assert f"#   deepspeed launch/train.py launch/recipes/{name}.yaml" in head
