"""On CUDA the model finds its tensors on the device, waits for nothing, keeps what is documented.

Run in full size, forward and backward, on a device that is not there (device.py). That it ran at
all is a finding: a tensor left on the host raises.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.stub import run

pytestmark = pytest.mark.slow

# Bytes per token and layer: phi3v/model/checkpointing.py has them, docs/performance.md in KB.
LAYERS = {
    "decoder": {"none": 82_056, "selective": 69_760, "full": 6_144},
    "tower": {"none": 24_656, "selective": 20_544, "full": 2_048},
}
BY_SDPA = {("decoder", "none"): 88_200}
# GB that a forward pass of the pack keeps by the decoder's and the tower's checkpointing, as
# docs/performance.md has them; the last with the head's 0.6, of which the page speaks apart.
PACKS = {("none", "none"): 38.6, ("none", "full"): 23.0, ("full", "full"): 3.7}

# What the host waits for in an optimizer step, DeepSpeed's own waits apart, and why.
REMAINING = {
    "_local_scalar_dense by loop.py train_step": (
        "after the last micro-step: the loss, and what the ranks wish, decide what comes next"
    ),
}


@pytest.fixture(scope="module")
def found(stub: Path) -> dict[str, Any]:
    """What tests/cuda/passes.py prints: a minute of computing in shapes."""
    return json.loads(run(stub, "tests.cuda.passes").splitlines()[-1])


def test_a_pass_waits_for_nothing_and_leaves_nothing(found: dict[str, Any]) -> None:
    assert len(found["cases"]) >= 20
    for name, case in found["cases"].items():
        assert case["waits"] == {}, name
        assert case["left"] == 0, name


def test_a_step_waits_once_at_its_end(found: dict[str, Any]) -> None:
    assert found["step"].keys() == REMAINING.keys()


def test_a_layer_keeps_the_documented_bytes_of_a_token(found: dict[str, Any]) -> None:
    assert len(found["layers"]) == 18
    for name, kept in found["layers"].items():
        kind, backend, how = name.split()
        documented = LAYERS[kind][how]
        if backend == "sdpa":
            documented = BY_SDPA.get((kind, how), documented)
        assert kept == pytest.approx(documented, rel=0.01), name


@pytest.mark.parametrize(("how", "vision"), PACKS)
def test_a_pack_keeps_the_documented_bytes(found: dict[str, Any], how: str, vision: str) -> None:
    name = f"checkpointing={how} vision_checkpointing={vision} pack=pictures"
    passes = [found["cases"].get(f"attention={backend} {name}") for backend in ("varlen", "flash")]
    for each in filter(None, passes):
        assert each["kept"] / 1e9 == pytest.approx(PACKS[how, vision], rel=0.02)
    assert passes[0] is not None


def test_offloading_moves_what_full_checkpointing_keeps_to_the_host(found: dict[str, Any]) -> None:
    """The inputs of all layers: 32 of the decoder's tokens, 23 of the views'."""
    full = "attention=varlen checkpointing=full vision_checkpointing=full pack=pictures"
    moved = found["cases"][full]["kept"] - found["cases"][f"{full} offload=True"]["kept"]
    assert moved == pytest.approx(8192 * 32 * 6144 + 52 * 577 * 23 * 2048, rel=0.01)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("angles on the host", r"cuda:0 and cpu"),
        ("places on the host", r"\(index\) cpu"),
        ("angles in float32", r"AssertionError: \{torch.float32\}"),
    ],
)
def test_a_tensor_that_no_kernel_takes_is_found(
    found: dict[str, Any], fault: str, error: str
) -> None:
    assert re.search(error, found["faults"][fault]["raised"])


@pytest.mark.parametrize(
    ("fault", "wait"),
    [
        ("reading the loss", "_local_scalar_dense by loss.py forward < phi3v.py packed_loss"),
        (
            "copying from memory that is not pinned",
            "_to_copy by phi3v.py embed < phi3v.py packed_loss",
        ),
    ],
)
def test_a_wait_is_found(found: dict[str, Any], fault: str, wait: str) -> None:
    assert wait in found["faults"][fault]["waits"]
