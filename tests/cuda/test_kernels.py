"""The bodies that torch.compile fuses become machine code for A100 and H100, one kernel each."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from phi3v.model import fused
from tests.cuda.stub import run

INSTALL = "pip install -c constraints.txt -e '.[kernels]'"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason=f"no triton ({INSTALL})"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="Triton interprets"),
]

# By torch 2.13: the sum over tokens is made in two steps, the two results of swiglu's gradients
# have other widths.
KERNELS = {
    "norm": 1,
    "norm_input_gradient": 1,
    "norm_weight_gradient": 2,
    "turn": 1,
    "turn_back": 1,
    "swiglu": 1,
    "swiglu_gradients": 2,
    "quick_gelu": 1,
    "quick_gelu_gradients": 1,
}


@pytest.fixture(scope="module")
def cubins(stub: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[int]]]:
    """Bytes by body, kernel and capability; compiled anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        liger = ("liger",) if find_spec("liger_kernel") else ()
        return json.loads(run(stub, "tests.cuda.kernels", *liger).splitlines()[-1])


def test_every_body_becomes_its_kernels_for_both_capabilities(
    cubins: dict[str, list[list[int]]],
) -> None:
    assert {name: len(kernels) for name, kernels in cubins.items() if name != "liger"} == KERNELS
    assert all(size > 4096 for kernels in cubins.values() for each in kernels for size in each)


def test_no_body_is_forgotten() -> None:
    """Bodies are the functions of tensors that `_run` is given, and what they call."""
    helpers = {"_flat", "_per_token", "_run", "_fuse", "_wide", "_swap_halves"}
    functions = {
        name
        for name, value in vars(fused).items()
        if name.startswith("_")
        and callable(value)
        and getattr(value, "__module__", "") == fused.__name__
        and not isinstance(value, type)
    }
    assert functions - helpers == {f"_{name}" for name in KERNELS}


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason=f"no liger-kernel ({INSTALL})")
def test_ligers_cross_entropy_becomes_a_kernel(cubins: dict[str, list[list[int]]]) -> None:
    ((a100, h100),) = cubins["liger"]
    assert min(a100, h100) > 4096
