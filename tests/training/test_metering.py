"""FLOPs by torch's own count and by hand, and the line that every step leaves."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from phi3v.config import MODULES, RunConfig, build_recipe, default_deepspeed, load_deepspeed
from phi3v.config.schema import CostSection
from phi3v.data import Dataset
from phi3v.data.batch import collate, model_inputs
from phi3v.data.loader import Step
from phi3v.data.packing import NO_SAMPLES, Position
from phi3v.geometry import Grid, image_tokens
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.training import metering
from phi3v.training.metering import Meter, device_peak, peak_memory, sample_costs, sample_flops
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
    "memory_gb packing balance views_per_second is_warmup"
).split()


# --- by hand ---


def conversation(grid: Grid, text: int, frozen: tuple[str, ...] = ()) -> float:
    """TFLOPs of training on one picture and some text, logits everywhere."""
    pictures = image_tokens(grid, 12)
    return flops_of(pictures + text, pictures + text, grid.views, pictures, frozen) / 1e12


def flops_of(tokens: int, labels: int, views: int, pictures: int, frozen: Any = ()) -> float:
    """Of one sample of the published model."""
    counts = (np.array([count]) for count in (tokens, labels, views, pictures))
    (flops,) = sample_flops(PUBLISHED, *counts, frozen)
    return float(flops)


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
    assert round(flops_of(2048, 2048, 0, 0) / 2048 / 1e9, 1) == 23.5


def test_a_view_costs_what_49_trained_tokens_cost() -> None:
    assert round(flops_of(0, 0, 1, 0) / flops_of(1, 1, 0, 0)) == 49


def test_each_sample_of_many_costs_what_it_costs_alone() -> None:
    counts = np.random.default_rng(0).integers(0, 3000, (4, 7)).astype(np.int32)
    together = sample_flops(PUBLISHED, *counts, ("language",))
    assert together.dtype == np.float64
    alone = [flops_of(*map(int, sample), ("language",)) for sample in counts.T]
    assert together.tolist() == pytest.approx(alone, rel=1e-12)


def test_a_long_sequence_does_not_overflow() -> None:
    """120,000 squared is more than an int32 holds."""
    long, half = (
        sample_flops(PUBLISHED, *np.array([[tokens], [0], [0], [0]], dtype=np.int32))
        for tokens in (120_000, 60_000)
    )
    assert 2 * half < long < 4 * half


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
    tokens, views = dataset.tokens[picked].astype(float), int(dataset.views[picked].sum())
    patches = (tower.image_size // tower.patch_size) ** 2
    attention = 2 * config.num_hidden_layers * config.hidden_size * np.square(tokens).sum()
    in_tower = config.tower_layers * 4 * (patches + 1) ** 2 * tower.hidden_size * views
    pixels = 2 * 3 * tower.patch_size**2 * patches * tower.hidden_size * views
    only_head = set(MODULES) - set(frozen) == {"head"}
    is_still = "vision" in frozen
    omitted = attention * (1 if only_head else 3) + in_tower * (1 if is_still else 3)
    # Pixels need no gradient, which no formula bothers to know: half of a convolution's backward.
    unspent = 0 if is_still else pixels

    lengths = (dataset.tokens, dataset.label_tokens, dataset.views, dataset.image_tokens)
    formula = sample_flops(config, *(of[picked] for of in lengths), frozen).sum()
    assert counter.get_total_flops() + omitted + unspent == formula


# --- the cost of a sample ---


@pytest.fixture
def dataset(tiny_shards: Path) -> Dataset:
    return Dataset(tiny_shards, "train")


@pytest.fixture
def config(tiny_model: Path) -> Phi3VConfig:
    return Phi3VConfig.from_pretrained(tiny_model)


def test_without_coefficients_a_sample_costs_its_flops(
    config: Phi3VConfig, dataset: Dataset
) -> None:
    counts = dataset.tokens, dataset.label_tokens, dataset.views, dataset.image_tokens
    for frozen in ((), ("vision",)):
        costs = sample_costs(config, dataset, CostSection(), frozen)
        assert np.array_equal(costs, sample_flops(config, *counts, frozen))


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("token", lambda d: d.tokens),
        ("token_pair", lambda d: d.tokens.astype(float) ** 2),
        ("view", lambda d: d.views),
        ("label_token", lambda d: d.label_tokens),
    ],
)
def test_each_coefficient_counts_its_own(
    key: str, expected: Any, config: Phi3VConfig, dataset: Dataset
) -> None:
    costs = sample_costs(config, dataset, CostSection(**{key: 0.5}))
    assert costs.shape == (len(dataset),)
    assert costs.tolist() == pytest.approx((0.5 * expected(dataset)).tolist())


def test_coefficients_add_up(config: Phi3VConfig, dataset: Dataset) -> None:
    names = ("token", "token_pair", "view", "label_token")
    one_by_one = sum(sample_costs(config, dataset, CostSection(**{name: 2.0})) for name in names)
    together = sample_costs(config, dataset, CostSection(**dict.fromkeys(names, 2.0)))
    assert together.tolist() == pytest.approx(one_by_one.tolist())


# --- the line of a step ---


Build = Callable[..., Meter]


@pytest.fixture
def build(tiny_model: Path, tiny_shards: Path, dataset: Dataset, config: Phi3VConfig) -> Build:
    def meter(*overrides: str, bf16: bool = False) -> Meter:
        values = {
            "run": {"out": "runs/demo"},
            "model": {"path": str(tiny_model)},
            "data": {"shards": str(tiny_shards), "max_tokens": 300},
            "optim": {"lr": 1e-3},
            "train": {"max_steps": 1000},
        }
        cfg = build_recipe(RunConfig, values, Path("demo.yaml"), overrides)
        ds = load_deepspeed(default_deepspeed(has_cuda=False), 2)
        if bf16:
            ds = replace(ds, json=dict(ds.json) | {"bf16": {"enabled": True}})
        return Meter(dataset, config, cfg, ds, 2, CPU)

    return meter


@pytest.fixture
def meter(build: Build) -> Meter:
    return build()


def step(*packs: list[int]) -> Step:
    arrays = [np.array(pack) if pack else NO_SAMPLES for pack in packs]
    return Step(arrays, (), Position(), Position(), wait_seconds=0.25)


def test_a_step_is_measured_over_all_ranks(meter: Meter, dataset: Dataset) -> None:
    line = meter.measure(step([0, 1], [2], [3], [4, 5]), seconds=2.0)
    assert list(line) == KEYS
    assert json.loads(json.dumps(line, allow_nan=False)) == line
    assert line["samples"] == 6
    assert line["tokens"] == dataset.tokens[:6].sum()
    assert line["label_tokens"] == dataset.label_tokens[:6].sum()
    assert line["views"] == dataset.views[:6].sum()
    assert (line["step_seconds"], line["data_wait_seconds"]) == (2.0, 0.25)
    assert line["tokens_per_second"] == line["tokens"] / 2
    assert line["views_per_second"] == line["views"] / 2
    assert line["packing"] == line["tokens"] / (4 * 300)
    assert line["mfu"] is None
    assert 0.1 < line["memory_gb"] < 100


def test_the_first_step_of_a_process_is_marked(build: Build) -> None:
    for meter in (build(), build()):
        marks = [meter.measure(step([0], [1]), 1.0)["is_warmup"] for _ in range(3)]
        assert marks == [True, False, False]


def test_the_flops_of_a_step_are_those_of_its_samples(
    meter: Meter, dataset: Dataset, config: Phi3VConfig
) -> None:
    flops = sample_costs(config, dataset, CostSection())
    line = meter.measure(step([0, 1], [2], [3], [4, 5]), seconds=2.0)
    assert line["flops"] == pytest.approx(flops[:6].sum(), rel=1e-12)


def test_balance_compares_the_packs_that_run_side_by_side(meter: Meter) -> None:
    def balance(*packs: list[int]) -> float:
        return meter.measure(step(*packs), 1.0)["balance"]

    assert balance([0], [0], [1, 2], [1, 2]) == 1
    assert balance([0], []) == 0.5
    costs = [meter.measure(step([i], [i]), 1.0)["flops"] / 2 for i in range(3)]
    alone, both = costs[0], costs[1] + costs[2]
    assert balance([0], [1, 2]) == pytest.approx((alone + both) / 2 / max(alone, both))


def test_balance_goes_by_the_costs_of_the_recipe(build: Build, dataset: Dataset) -> None:
    low, high = int(dataset.label_tokens.argmin()), int(dataset.label_tokens.argmax())
    packs = step([low], [high])
    line = build("data.cost.label_token=3").measure(packs, 1.0)
    costs = dataset.label_tokens[[low, high]]
    assert line["balance"] == pytest.approx(costs.mean() / costs.max())
    assert line["balance"] != build().measure(packs, 1.0)["balance"]


def test_balance_goes_by_the_flops_of_what_is_trained(
    build: Build, dataset: Dataset, config: Phi3VConfig
) -> None:
    low, high = int(dataset.views.argmin()), int(dataset.views.argmax())
    frozen = ("vision", "projector", "language", "embeddings")
    line = build(f"model.freeze=[{', '.join(frozen)}]").measure(step([low], [high]), 1.0)
    costs = sample_costs(config, dataset, CostSection(), frozen)[[low, high]]
    assert line["balance"] == pytest.approx(costs.mean() / costs.max(), rel=1e-12)


def test_a_step_that_costs_nothing_is_balanced(build: Build) -> None:
    assert build("data.cost.view=1").measure(step([], []), 1.0)["balance"] == 1


def test_packs_behind_the_last_epoch_cost_nothing(meter: Meter) -> None:
    full, padded = (meter.measure(step(*packs), 1.0) for packs in ([[0], [1]], [[0], [1], [], []]))
    for key in ("samples", "tokens", "label_tokens", "views", "flops", "balance"):
        assert full[key] == padded[key]
    assert padded["packing"] == full["packing"] / 2


def test_frozen_modules_cost_less(build: Build) -> None:
    after, before = (
        build(*overrides).measure(step([0], [1]), 1.0)
        for overrides in (["model.freeze=[vision, language]"], [])
    )
    assert after["flops"] < before["flops"]


def test_mfu_is_the_share_of_all_ranks_peak(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "device_peak", lambda device: 1e12)
    line = build(bf16=True).measure(step([0], [1]), seconds=0.5)
    assert line["mfu"] == pytest.approx(line["flops"] / (0.5 * 2 * 1e12))


def test_a_run_in_float32_has_no_mfu(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peaks are those of bf16; float32 has others."""
    monkeypatch.setattr(metering, "device_peak", lambda device: 1e12)
    assert build(bf16=False).measure(step([0], [1]), 0.5)["mfu"] is None


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("A100-PCIE-40GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA A40", 149.7),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_are_known_by_the_devices_name(
    name: str, teraflops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = device_peak(torch.device("cuda", 0))
    assert peak == (None if teraflops is None else teraflops * 1e12)
    assert device_peak(CPU) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_peak_memory_of_a_device_counts_what_was_let_go() -> None:
    device = torch.device("cuda", 0)
    before = peak_memory(device)
    torch.empty(int(1e9), dtype=torch.uint8, device=device)
    assert before + 1 <= peak_memory(device) + 0.01
