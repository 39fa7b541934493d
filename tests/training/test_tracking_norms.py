"""The norm of each module's gradient is exact under every optimizer that ZeRO has."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from phi3v.config import MODULES, default_deepspeed
from tests.commands import run_ranks
from tests.training.modules import FROZEN

pytestmark = pytest.mark.slow

# Stage 1 in bf16 has an optimizer of its own; an offloaded one takes its norms on the host.
CASES = ("bf16-zero1", "fp32-zero2", "bf16-zero3", "fp32-zero3_offload", "fp32-zero3_cpu")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What two ranks say of a step under each case."""
    folder = tmp_path_factory.mktemp("norms")
    for case in CASES:
        precision, name = case.split("-")
        shipped = default_deepspeed(has_cuda=True).with_name(f"{name}.json")
        content = json.loads(shipped.read_text(encoding="utf-8"))
        params = {"torch_adam": True, "betas": [0.9, 0.95], "eps": 1e-8}
        content |= {"train_batch_size": 4, "optimizer": {"type": "AdamW", "params": params}}
        if name == "zero3":  # divides the decaying language group, of 10,240 numbers
            content["zero_optimization"]["sub_group_size"] = 4000
        if precision == "fp32":
            content = {k: v for k, v in content.items() if not k.endswith(("_type", "_types"))}
            content["bf16"] = {"enabled": False}
        (folder / f"{case}.json").write_text(json.dumps(content))
    script, out = Path(__file__).with_name("modules.py"), folder / "found"
    run_ranks(2, script, folder, out)
    result: dict[str, dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    return result


@pytest.mark.parametrize("case", CASES)
def test_the_modules_norms_are_those_of_their_gradients(
    found: dict[str, dict[str, Any]], case: str
) -> None:
    """Measured: 1.2e-7 apart at most. A frozen module has none, a skipped step NaN for each."""
    of = found[f"{case}.json"]
    assert set(of["norms"]) == set(MODULES) - {FROZEN}
    assert of["norms"] == pytest.approx(of["whole"], rel=1e-5)
    assert math.hypot(*of["norms"].values()) == pytest.approx(of["total"], rel=1e-6)
    assert (of["parts"] > 1) == (case == "bf16-zero3")
    assert set(of["bad"]) == set(of["norms"]) and all(map(math.isnan, of["bad"].values()))
