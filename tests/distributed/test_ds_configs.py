"""Every file of ds_configs/ trains on 2 ranks, with the optimizer that it names.

The tests of DeepSpeed's own Adam are skipped where launch/build.py has not built it, which takes
minutes on a busy machine.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from phi3v.config import MODULES, default_deepspeed
from phi3v.training.extensions import extensions_folder
from phi3v.training.optimizer import module_of
from tests.commands import metrics, plain, run, run_ranks

pytestmark = pytest.mark.slow

FOLDER = default_deepspeed(has_cuda=True).parent
SHIPPED = sorted(path.name for path in FOLDER.glob("*.json"))
IN_BF16 = ["zero1.json", "zero2.json", "zero3.json", "zero3_hpz.json", "zero3_offload.json"]
IN_BF16 += ["zero3_small.json"]
STEPS = 8
HALF = STEPS // 2


BETAS = {"betas": [0.9, 0.95], "eps": 1e-8}


def adapted(name: str, folder: Path, copy: str = "", **changes: Any) -> Path:
    """A shipped file with a batch of 4 packs and the same betas; `changes` replace whole sections.

    copy  its name, if not that of the file
    """
    content = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    content["train_batch_size"] = 4
    content["optimizer"]["params"] |= BETAS
    path = folder / (copy or name)
    path.write_text(json.dumps(content | changes), encoding="utf-8")
    return path


def steps(kind: str, config: Path, ranks: int) -> dict[str, Any]:
    """What tests/distributed/steps.py found."""
    script, out = Path(__file__).with_name("steps.py"), config.with_suffix(".out")
    run_ranks(ranks, script, kind, config, out)
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return result


def test_every_shipped_file_but_the_cpus_is_tested_in_bf16() -> None:
    assert sorted([*IN_BF16, "zero3_cpu.json"]) == SHIPPED


# --- bf16 ---


def check_precision(found: dict[str, Any]) -> None:
    """Measured: gradients 2e-10 apart, movements 0.003, with every file and optimizer.

    With bf16 to communicate or to add up in, gradients are 0.0015 and 0.0021 apart. A step moves a
    weight by 1 % of what bf16 can show, so weights without a float32 master would stay for ever.
    """
    assert found["gradient"] < 1e-6
    assert found["movement"] < 0.02
    assert found["changed_first"] < 0.03
    assert found["changed_last"] > 0.25
    assert found["is_rounded"]


def compiled(name: str) -> bool:
    """Whether launch/build.py has built DeepSpeed's extension on this machine."""
    return (extensions_folder() / name / "built.json").is_file()


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not compiled(name), reason=f"{name} is not built here; see launch/build.py"
    )


@pytest.fixture(scope="module")
def precisions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the bf16 files do, and zero3 and zero3_offload with other optimizers."""
    folder = tmp_path_factory.mktemp("bf16")
    for name in IN_BF16:
        adapted(name, folder)
    others = {"torch.json": ("zero3.json", {"torch_adam": True})}
    if compiled("fused_adam"):
        others["fused.json"] = ("zero3.json", {})
    if compiled("cpu_adam"):
        others["cpu.json"] = ("zero3_offload.json", {})
    for copy, (name, params) in others.items():
        adapted(name, folder, copy, optimizer={"type": "AdamW", "params": params | BETAS})
    return steps("precision", folder, 2)


@pytest.mark.parametrize("name", IN_BF16)
def test_bf16_keeps_weights_and_adds_up_gradients_in_float32(
    name: str, precisions: dict[str, Any]
) -> None:
    check_precision(precisions[name])


@pytest.mark.parametrize(
    "copy",
    [
        pytest.param("torch.json", id="torch, not fused"),
        pytest.param("fused.json", id="DeepSpeed's FusedAdam", marks=needs("fused_adam")),
        pytest.param("cpu.json", id="DeepSpeed's CPUAdam", marks=needs("cpu_adam")),
    ],
)
def test_every_optimizer_takes_the_steps_of_adamw(copy: str, precisions: dict[str, Any]) -> None:
    check_precision(precisions[copy])


# --- what is trained ---


def is_unused(name: str) -> bool:
    """Whether nobody reads its output: the tower's third layer and its last norm."""
    return "encoder.layers.2." in name or "post_layernorm" in name


@pytest.mark.parametrize("name", ["zero1.json", "zero3.json"])
def test_a_step_changes_what_is_trained_and_nothing_else(name: str, tmp_path: Path) -> None:
    config = adapted(name, tmp_path, bf16={"enabled": False})
    cases = steps("frozen", config, 1)
    assert cases.keys() == {"", *MODULES}
    for frozen, case in cases.items():
        names = [*case["changed"], *case["left"]]
        assert {module_of(name) for name in names} == set(MODULES)
        left = {name for name in names if is_unused(name) or module_of(name) == frozen}
        assert set(case["left"]) == left, frozen
        assert {rate[0] for rate in case["rates"]} == set(MODULES) - {frozen}
        peak = max(lr for _, _, lr in case["rates"])
        assert all(lr == pytest.approx(scale * peak) for _, scale, lr in case["rates"])
    assert {scale for _, scale, _ in cases[""]["rates"]} == {1.0, 0.5, 0.25}


# --- float32 ---


def test_in_float32_every_file_takes_the_same_steps(tmp_path: Path) -> None:
    """And leaves the weights as they are where a gradient is not a number, and says so."""
    for name in SHIPPED:
        adapted(name, tmp_path, bf16={"enabled": False})
    found = steps("losses", tmp_path, 2)
    assert sorted(found) == SHIPPED
    expected = found["zero3_cpu.json"]["losses"]
    assert expected[-1] < 0.9 * expected[0]
    for name, case in found.items():
        # Measured: 1.3e-7.
        assert case["losses"] == pytest.approx(expected, rel=1e-5), name
        assert case["kept"] and not math.isfinite(case["norm"]), name


# --- the whole program ---


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path, tiny_model: Path) -> Path:
    """A run recipe on the tiny shards."""
    path = tmp_path_factory.mktemp("recipe") / "run.yaml"
    values = {
        "run": {"out": "run"},
        "model": {"path": str(tiny_model)},
        "data": {"shards": str(tiny_shards), "max_tokens": 264, "max_views": 32},
        "optim": {
            "lr": 1e-3,
            "weight_decay": 0.1,
            "vision_layer_decay": 0.5,
            "schedule": "constant",
        },
        "train": {"max_steps": STEPS},
        "eval": {"rows": 2, "metrics": ["exact_match"], "max_new_tokens": 4, "blind": False},
    }
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return path


def train(recipe: Path, config: Path, max_steps: int) -> list[float]:
    """Train on 2 ranks up to a step, taking up what is there; the losses of all steps."""
    values = [f"train.max_steps={max_steps}", "--deepspeed_config", config]
    done = run(*plain(2, recipe, *values), cwd=config.parent)
    assert done.returncode == 0, done.stderr
    return [line["loss"] for line in metrics(config.parent / "run")]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> list[float]:
    return train(recipe, adapted("zero3_cpu.json", tmp_path_factory.mktemp("unbroken")), STEPS)


def test_a_stage_that_keeps_weights_whole_trains_evaluates_and_resumes_as_stage_3(
    recipe: Path, unbroken: list[float], tmp_path: Path
) -> None:
    """The second half is taken up from a checkpoint; both halves end with an evaluation."""
    config = adapted("zero2.json", tmp_path, bf16={"enabled": False})
    assert len(train(recipe, config, HALF)) == HALF
    assert train(recipe, config, STEPS) == pytest.approx(unbroken, rel=1e-5)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["metrics"]["exact_match"]["n"] == 2
