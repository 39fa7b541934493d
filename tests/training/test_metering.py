"""FLOPs by torch's own count and by hand, and the line that every step leaves."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from phi3v.config import MODULES, RunConfig, build_recipe, default_deepspeed, load_deepspeed
from phi3v.data import Dataset
from phi3v.data.batch import collate, model_inputs
from phi3v.data.loader import NO_SAMPLES, Step
from phi3v.data.packing import Position
from phi3v.geometry import Grid, image_tokens
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.training import metering
from phi3v.training.metering import Meter, device_peak, step_flops
from phi3v.training.optimizer import freeze

CPU = torch.device("cpu")
# The published sizes; the tower's are the configuration's own defaults.
PUBLISHED = Phi3VConfig(
    vocab_size=32064,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
)
KEYS = (  # of metrics.jsonl, without those that the loop itself knows
    "samples tokens label_tokens views step_seconds data_wait_seconds tokens_per_second flops mfu "
    "memory_gb packing balance"
).split()


# --- by hand ---


def conversation(grid: Grid, text: int, frozen: tuple[str, ...] = ()) -> float:
    """TFLOPs of training on one picture and some text, logits everywhere."""
    pictures = image_tokens(grid, 12)
    length = pictures + text
    flops = step_flops(PUBLISHED, np.array([length]), length, grid.views, pictures, frozen)
    return flops / 1e12


@pytest.mark.parametrize(
    ("grid", "frozen", "teraflops"),
    [
        (Grid(3, 4), (), "62.08"),  # 1344 x 1008 at 16 crops: 13 views, 1,921 + 100 tokens
        (Grid(3, 4), ("vision",), "52.6"),
        (Grid(2, 2), (), "25.16"),  # 4 crops
        (Grid(3, 5), (), "76.2"),  # 16:9 at 16 crops
    ],
)
def test_worked_examples_of_the_published_model(
    grid: Grid, frozen: tuple[str, ...], teraflops: str
) -> None:
    digits = len(teraflops.split(".")[1])
    assert f"{conversation(grid, 100, frozen):.{digits}f}" == teraflops


def test_text_alone_costs_what_its_tokens_cost() -> None:
    flops = step_flops(PUBLISHED, np.array([2048]), 2048, 0, 0)
    assert round(flops / 2048 / 1e9, 1) == 23.5


def test_a_pack_costs_the_sum_of_its_samples() -> None:
    lengths = np.array([300, 1700, 40], dtype=np.int32)
    alone = sum(step_flops(PUBLISHED, np.array([n]), 5, 2, 99) for n in lengths)
    assert step_flops(PUBLISHED, lengths, 15, 6, 297) == pytest.approx(alone, rel=1e-12)


def test_a_long_sequence_does_not_overflow() -> None:
    one = step_flops(PUBLISHED, np.array([120_000], dtype=np.int32), 0, 0, 0)
    two = step_flops(PUBLISHED, np.array([120_000] * 2, dtype=np.int32), 0, 0, 0)
    assert two == 2 * one > 0


# --- by torch's counter ---


@pytest.mark.parametrize(
    "frozen",
    [
        (),
        ("vision",),
        ("language",),
        ("vision", "projector"),
        ("vision", "projector", "language"),
        ("vision", "projector", "embeddings"),
        ("vision", "projector", "embeddings", "language"),
        MODULES[1:],
    ],
)
def test_matrix_products_are_those_that_torch_counts(
    tiny_model: Path, tiny_shards: Path, frozen: tuple[Any, ...]
) -> None:
    """The counter omits scaled_dot_product_attention on CPU, so that goes by the formula."""
    dataset = Dataset(tiny_shards, "train")
    picked = np.arange(5)
    samples = [dataset[i] for i in picked]
    model = Phi3VForCausalLM.from_pretrained(tiny_model).train()
    freeze(model, frozen)
    inputs = model_inputs(collate(samples), dataset.view_settings, CPU)
    with FlopCounterMode(display=False) as counter:
        model(**inputs).backward()

    config, tower = model.config, model.config.vision_config
    lengths, views = dataset.tokens[picked].astype(float), int(dataset.views[picked].sum())
    patches = (tower.image_size // tower.patch_size) ** 2
    attention = 2 * config.num_hidden_layers * config.hidden_size * np.square(lengths).sum()
    in_tower = config.tower_layers * 4 * (patches + 1) ** 2 * tower.hidden_size * views
    pixels = 2 * 3 * tower.patch_size**2 * patches * tower.hidden_size * views
    only_head = set(MODULES) - set(frozen) == {"head"}
    is_still = "vision" in frozen
    omitted = attention * (1 if only_head else 3) + in_tower * (1 if is_still else 3)
    # Pixels need no gradient, which no formula bothers to know: half of a convolution's backward.
    unspent = 0 if is_still else pixels

    counts = dataset.label_tokens[picked].sum(), views, dataset.image_tokens[picked].sum()
    formula = step_flops(config, dataset.tokens[picked], *map(int, counts), frozen)
    assert counter.get_total_flops() + omitted + unspent == formula


# --- the line of a step ---


@pytest.fixture
def meter(tiny_model: Path, tiny_shards: Path) -> Meter:
    values = {
        "run": {"out": "runs/demo"},
        "model": {"path": str(tiny_model)},
        "data": {"shards": str(tiny_shards), "max_tokens": 300},
        "optim": {"lr": 1e-3},
        "train": {"max_steps": 1000},
    }
    return Meter(
        Dataset(tiny_shards, "train"),
        Phi3VConfig.from_pretrained(tiny_model),
        build_recipe(RunConfig, values, Path("demo.yaml"), []),
        load_deepspeed(default_deepspeed(has_cuda=False), 2),
        2,
        CPU,
    )


def step(*packs: list[int]) -> Step:
    arrays = [np.array(pack) if pack else NO_SAMPLES for pack in packs]
    return Step(arrays, (), 0, Position(0, len(packs)), wait_seconds=0.25)


def test_a_step_is_measured_over_all_ranks(meter: Meter) -> None:
    data = meter.dataset
    line = meter.measure(step([0, 1], [2], [3], [4, 5]), seconds=2.0)
    assert list(line) == KEYS
    assert json.loads(json.dumps(line, allow_nan=False)) == line
    assert line["samples"] == 6
    assert line["tokens"] == data.tokens[:6].sum()
    assert line["label_tokens"] == data.label_tokens[:6].sum()
    assert line["views"] == data.views[:6].sum()
    assert (line["step_seconds"], line["data_wait_seconds"]) == (2.0, 0.25)
    assert line["tokens_per_second"] == line["tokens"] / 2
    assert line["packing"] == line["tokens"] / (4 * 300)
    assert line["mfu"] is None
    assert 0.1 < line["memory_gb"] < 100


def test_balance_compares_the_packs_that_run_side_by_side(meter: Meter) -> None:
    def balance(*packs: list[int]) -> float:
        return meter.measure(step(*packs), 1.0)["balance"]

    assert balance([0], [0], [1, 2], [1, 2]) == 1
    assert balance([0], []) == 0.5
    costs = [meter.measure(step([i], [i]), 1.0)["flops"] / 2 for i in range(3)]
    alone, both = costs[0], costs[1] + costs[2]
    assert balance([0], [1, 2]) == pytest.approx((alone + both) / 2 / max(alone, both))


def test_packs_behind_the_last_epoch_cost_nothing(meter: Meter) -> None:
    full, padded = (meter.measure(step(*packs), 1.0) for packs in ([[0], [1]], [[0], [1], [], []]))
    for key in ("samples", "tokens", "label_tokens", "views", "flops", "balance"):
        assert full[key] == padded[key]
    assert padded["packing"] == full["packing"] / 2


def test_frozen_modules_cost_less(meter: Meter) -> None:
    cfg = replace(meter.cfg, model=replace(meter.cfg.model, freeze=("vision", "language")))
    before, after = (m.measure(step([0], [1]), 1.0) for m in (meter, replace(meter, cfg=cfg)))
    assert after["flops"] < before["flops"]


def test_mfu_is_the_share_of_all_ranks_peak(meter: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "device_peak", lambda device: 1e12)
    line = meter.measure(step([0], [1]), seconds=0.5)
    assert line["mfu"] == pytest.approx(line["flops"] / (0.5 * 2 * 1e12))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_are_known_by_the_devices_name(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert device_peak(torch.device("cuda", 0)) == peak
    assert device_peak(CPU) is None
