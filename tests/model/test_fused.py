"""The fused functions: exact derivatives, little kept, the same when compiled.

tests/model/test_layers.py compares them with transformers' modules.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.autograd import gradcheck
from torch.nn.functional import linear, silu

from phi3v.model.fused import quick_gelu_linear, rms_norm, rotate, swiglu_linear

ROUNDING = 2**-6  # of the largest number, bfloat16, whose steps are 2**-8 of it; measured: 1.2e-2

HEADS, GROUPS, HEAD_WIDTH = 4, 2, 6
PACKED = (HEADS + 2 * GROUPS) * HEAD_WIDTH


def angles(batch: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine (batch, tokens, HEAD_WIDTH) of random angles, as rotary() lays them out."""
    turns = torch.randn(batch, tokens, HEAD_WIDTH // 2, dtype=torch.float64).repeat(1, 1, 2)
    return turns.cos().to(dtype), turns.sin().to(dtype)


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def plain_rotation(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    heads = qkv.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)
    q, k, v = heads.split([HEADS, GROUPS, GROUPS], dim=1)
    half = HEAD_WIDTH // 2
    turned = (
        x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]
        for x in (q, k)
    )
    return (*turned, v)


def plain_swiglu(gate_up: Tensor, weight: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return linear(silu(gate) * up, weight)


def plain_quick_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear(x * torch.sigmoid(1.702 * x), weight, bias)


class Function:
    """A fused function, the same in plain operations, and the shapes of its inputs.

    `angled` says that cosine and sine follow the inputs, for which there is no gradient.
    """

    def __init__(
        self,
        fused: Callable[..., Any],
        plain: Callable[..., Any],
        shapes: Callable[[int], list[tuple[int, ...]]],
        angled: bool = False,
    ) -> None:
        self.fused, self.plain, self.shapes, self.angled = fused, plain, shapes, angled

    def draw(
        self, dtype: torch.dtype, tokens: int = 5, frozen: tuple[int, ...] = ()
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        torch.manual_seed(tokens)
        inputs = [torch.randn(shape, dtype=dtype) for shape in self.shapes(tokens)]
        for number, value in enumerate(inputs):
            value.requires_grad_(number not in frozen)
        return inputs, angles(2, tokens, dtype) if self.angled else ()


FUNCTIONS = {
    "rms norm": Function(
        lambda x, w, compiled=False: rms_norm(x, w, 1e-5, compiled),
        plain_norm,
        lambda tokens: [(2, tokens, 8), (8,)],
    ),
    "rotation": Function(
        lambda qkv, cos, sin, compiled=False: rotate(qkv, cos, sin, HEADS, compiled),
        plain_rotation,
        lambda tokens: [(2, tokens, PACKED)],
        angled=True,
    ),
    "swiglu": Function(swiglu_linear, plain_swiglu, lambda tokens: [(2, tokens, 12), (4, 6)]),
    "quick gelu": Function(
        quick_gelu_linear, plain_quick_gelu, lambda tokens: [(2, tokens, 6), (4, 6), (4,)]
    ),
}
SETS = [
    (name, frozen)
    for name, function in FUNCTIONS.items()
    for frozen in ((), *[(n,) for n in range(len(function.shapes(1)))])
    if len(frozen) < len(function.shapes(1))
]


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def differentiated(call: Callable[..., Any], inputs: list[Tensor], rest: Any) -> list[Tensor]:
    """What a function gives, and the gradients of the inputs that have one."""
    results = outputs(call(*inputs, *rest))
    torch.manual_seed(1)
    incoming = [torch.randn_like(result) for result in results]
    trained = [value for value in inputs if value.requires_grad]
    return [*results, *torch.autograd.grad(results, trained, incoming)]


def distance(ours: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, by the largest number of each tensor."""
    pairs = zip(ours, expected, strict=True)
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize(("name", "frozen"), SETS)
def test_derivatives_are_exact_for_whatever_is_trained(name: str, frozen: tuple[int, ...]) -> None:
    function = FUNCTIONS[name]
    inputs, rest = function.draw(torch.float64, 3, frozen)
    assert gradcheck(lambda *values: function.fused(*values, *rest), inputs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_those_of_plain_operations(name: str) -> None:
    function = FUNCTIONS[name]
    inputs, rest = function.draw(torch.float64)
    ours = differentiated(function.fused, inputs, rest)
    assert distance(ours, differentiated(function.plain, inputs, rest)) < 1e-14
    with torch.no_grad():
        for one, other in zip(outputs(function.fused(*inputs, *rest)), ours, strict=False):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inputs_are_left_as_they_were(name: str) -> None:
    function = FUNCTIONS[name]
    inputs, rest = function.draw(torch.float32)
    before = [value.detach().clone() for value in (*inputs, *rest)]
    differentiated(function.fused, inputs, rest)
    assert all(torch.equal(*pair) for pair in zip((*inputs, *rest), before, strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_have_the_dtype_of_what_they_belong_to(name: str) -> None:
    function = FUNCTIONS[name]
    inputs, rest = function.draw(torch.bfloat16)
    results = outputs(function.fused(*inputs, *rest))
    torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    assert all(value.grad is not None and value.grad.dtype == value.dtype for value in inputs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_is_kept_but_the_inputs_and_a_number_per_token(name: str) -> None:
    """And a weight is kept as the parameter itself, which ZeRO-3 empties and fills again."""
    function = FUNCTIONS[name]
    inputs, rest = function.draw(torch.float32)
    kept: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        function.fused(*inputs, *rest)
    known = [value.data_ptr() for value in (*inputs, *rest)]
    strangers = [value for value in kept if value.data_ptr() not in known]
    tokens = inputs[0][..., 0].numel()
    assert sum(value.numel() for value in strangers) == (tokens if name == "rms norm" else 0)
    assert (inputs[0].data_ptr() in [value.data_ptr() for value in kept]) != function.angled
    assert all(any(value is one for value in kept) for one in inputs[1:2])


def test_queries_keys_and_values_lie_in_one_tensor() -> None:
    """As attention keeps all three, and a copy of its own of none."""
    inputs, rest = FUNCTIONS["rotation"].draw(torch.float32)
    q, k, v = rotate(inputs[0], *rest, HEADS)
    storage = q.untyped_storage()
    assert storage.data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert storage.nbytes() == inputs[0].nbytes
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1


def test_one_row_of_angles_serves_all_sequences() -> None:
    inputs, _ = FUNCTIONS["rotation"].draw(torch.float32)
    cos, sin = angles(1, 5, torch.float32)
    ours = differentiated(rotate, inputs, (cos, sin, HEADS))
    expected = differentiated(rotate, inputs, (cos.repeat(2, 1, 1), sin.repeat(2, 1, 1), HEADS))
    assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def _compiler(kernels: Path) -> Iterator[None]:
    """torch.compile with nothing compiled, and a cache of its own."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(kernels)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_is_eager_within_rounding_whatever_the_number_of_tokens(name: str) -> None:
    function = FUNCTIONS[name]
    graphs = []
    for tokens in (10, 7, 33):
        inputs, rest = function.draw(torch.bfloat16, tokens)
        ours = differentiated(partial(function.fused, compiled=True), inputs, rest)
        assert distance(ours, differentiated(function.fused, inputs, rest)) < ROUNDING
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs == graphs[:1] * 3, "a length was compiled for itself"
