"""What export reads from the checkpoint of any ZeRO stage are the engine's own weights."""

import json
from pathlib import Path
from typing import Any

import pytest

from phi3v.config import default_deepspeed
from tests.commands import run_ranks

pytestmark = pytest.mark.slow

STAGES = ("zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    """Of two ranks and a frozen tower, by precision and stage; see exported.py."""
    folder = tmp_path_factory.mktemp("stages")
    for stage in STAGES:
        file = default_deepspeed(has_cuda=True).parent / f"{stage}.json"
        content: dict[str, Any] = json.loads(file.read_text())
        params = {"torch_adam": True, "betas": [0.9, 0.95], "eps": 1e-8}
        content |= {"train_batch_size": 2, "optimizer": {"type": "AdamW", "params": params}}
        (folder / f"bf16-{stage}.json").write_text(json.dumps(content))
        content = {k: v for k, v in content.items() if not k.endswith(("_type", "_types"))}
        content["bf16"] = {"enabled": False}
        (folder / f"fp32-{stage}.json").write_text(json.dumps(content))
    program = Path(__file__).with_name("exported.py")
    run_ranks(2, program, folder)
    result: dict[str, dict[str, list[str]]] = json.loads((folder / "found").read_text())
    return result


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_weights_read_are_the_engines_masters_and_frozen_parameters(
    found: dict[str, dict[str, list[str]]], stage: str, kind: str
) -> None:
    """Bit for bit and in float32: in bf16 the masters are not what the model computes with."""
    of = found[f"{kind}-{stage}.json"]
    frozen = {name for name in of["read"] if ".vision_model." in name}
    assert frozen and set(of["moved"]) == set(of["read"]) - frozen
    assert not of["differ"]
