"""The bodies of phi3v/model/fused.py and Liger's kernel, compiled for A100 and H100 without one.

    python -m tests.cuda.stub STUB tests.cuda.kernels     # prints JSON: bytes of cubins by kernel

torch.compile's lowering writes Triton for a device that is pretended; Triton's own assembler makes
machine code of it. Tile sizes are chosen here, which on a GPU are tried out. Needs triton, and the
internals of the torch that constraints.txt names.
"""

import ast
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._inductor.runtime.hints as hints
import torch._inductor.scheduler as scheduler
import triton
from torch import Tensor
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from phi3v.model import fused

CUDA, TOKENS = torch.device("cuda", 0), 4096
WIDTH, INNER, HEADS, HEAD_WIDTH = 3072, 8192, 32, 96  # the published decoder's
TOWER_INNER = 4096
CAPABILITIES = (80, 90)
H100 = hints.DeviceProperties("cuda", 0, 132, 90, 9, 65536, 2048, 1024, 32)
PRELUDE = """import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math
"""


class Driver:
    """What Triton asks of the device's driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CUDA

    def get_device_interface(self) -> Any:
        return torch.cuda


def pretend_an_h100() -> None:
    hints.DeviceProperties.create = classmethod(lambda cls, device: H100)
    scheduler.has_triton = lambda *_: True
    torch.cuda.is_available, torch.cuda.current_device = lambda: True, lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: H100
    triton.runtime.driver.set_active(Driver())


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, device=CUDA, dtype=dtype)


def bodies() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Every body that fused.py compiles, with arguments of the published widths."""
    tokens, scale = empty(TOKENS, WIDTH), empty(TOKENS, 1, dtype=torch.float32)
    weight, angle = empty(WIDTH), empty(TOKENS, HEAD_WIDTH)
    heads = empty(TOKENS, 3 * HEADS, HEAD_WIDTH).split(HEADS, dim=1)
    gate_up, tower = empty(TOKENS, 2 * INNER), empty(TOKENS, TOWER_INNER)
    return {
        "norm": (lambda x, w: fused._norm(x, w, 1e-5), (tokens, weight)),
        "norm_input_gradient": (fused._norm_input_gradient, (tokens, tokens, weight, scale)),
        "norm_weight_gradient": (fused._norm_weight_gradient, (tokens, tokens, scale)),
        "turn": (fused._turn, (*heads, angle, angle)),
        "turn_back": (fused._turn_back, (*heads, angle, angle)),
        "swiglu": (fused._swiglu, (gate_up,)),
        "swiglu_gradients": (fused._swiglu_gradients, (empty(TOKENS, INNER), gate_up)),
        "quick_gelu": (fused._quick_gelu, (tower,)),
        "quick_gelu_gradients": (fused._quick_gelu_gradients, (tower, tower)),
    }


def lower(body: Callable[..., Any], arguments: tuple[Any, ...], mode: FakeTensorMode) -> str:
    """The program that torch.compile would run, its Triton kernels as texts in it."""
    traced = make_fx(body, tracing_mode="fake", decomposition_table=select_decomp_table())
    graph = GraphLowering(traced(*arguments), example_inputs=list(arguments))
    handlers = V.set_graph_handler(graph), V.set_debug_handler(DebugContext())
    with handlers[0], handlers[1], V.set_fake_mode(mode):
        graph.run(*arguments)
        code, _ = graph.codegen()
    return str(getattr(code, "value", code))


def kernels_in(code: str, folder: Path) -> Iterator[ASTSource]:
    """Its kernels, each with sizes of its tiles; Triton reads a function from a file."""
    found = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", code, re.DOTALL)
    for number, (name, source) in enumerate(found):
        signature = ast.literal_eval(re.search(r"'signature': (\{.*?\})", source)[1])
        path = folder / f"kernel_{number}.py"
        path.write_text(PRELUDE + source[source.index("@triton.jit") :], encoding="utf-8")
        kernel = getattr(load(path), name)
        rows = (32 if "_per_" in name else 1) if "_poi_" not in name else 1024
        sizes = {"XBLOCK": rows, "R0_BLOCK": 2048}
        fixed = {
            (place,): sizes[argument]
            for place, argument in enumerate(kernel.arg_names)
            if signature[argument] == "constexpr"
        }
        yield ASTSource(kernel, signature, fixed)


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def liger_kernel() -> ASTSource:
    """Liger's cross entropy as its loss calls it: with gradients, made in the forward pass."""
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel as kernel

    absent = ("weight_ptr", "z_loss_ptr", "token_accuracy_ptr", "predicted_tokens_ptr", "softcap")
    off = ("RETURN_Z_LOSS", "RETURN_TOKEN_ACCURACY", "RETURN_PREDICTED_TOKENS")
    off += ("HAS_WEIGHT", "HAS_SOFTCAPPING")
    fixed = dict.fromkeys(absent) | dict.fromkeys(off, False)
    fixed |= {"HAS_GRADIENTS": True, "BLOCK_SIZE": 32768, "reduction": "sum"}
    kinds = {"X_ptr": "*bf16", "Y_ptr": "*i64", "loss_ptr": "*fp32", "weight_sum": "fp32"}
    kinds |= dict.fromkeys(("lse_square_scale", "label_smoothing"), "fp32")
    signature = {
        name: "constexpr" if name in fixed else kinds.get(name, "i32") for name in kernel.arg_names
    }
    places = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    return ASTSource(kernel, signature, places)


def cubins(source: ASTSource, warps: int) -> list[int]:
    """Bytes of its machine code for each capability."""
    return [
        len(
            triton.compile(
                source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}
            ).asm["cubin"]
        )
        for capability in CAPABILITIES
    ]


def main() -> None:
    pretend_an_h100()
    found: dict[str, list[list[int]]] = {}
    with FakeTensorMode() as mode:
        programs = {name: lower(body, given, mode) for name, (body, given) in bodies().items()}
    for name, code in programs.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = [cubins(source, 8) for source in kernels_in(code, Path(folder))]
    if "liger" in sys.argv:
        found["liger"] = [cubins(liger_kernel(), 32)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
