"""The head's loss is that of full logits, gradients included, and never makes them."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from phi3v.errors import ConfigError
from phi3v.model.loss import (
    CHUNK,
    Head,
    _add_product,
    choose_loss,
    chunked_loss,
    liger_loss,
    mean_loss,
    next_tokens,
)
from phi3v.sample import IGNORED

WIDTH, VOCABULARY = 16, 48
FACTOR = 0.37  # what the engine multiplies the loss by
BF16, FP32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")
FASTEST = torch.device("cuda") if torch.cuda.is_available() else CPU
PUBLISHED_WIDTH, PUBLISHED_VOCABULARY = 3072, 32064

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_liger = pytest.mark.skipif(
    find_spec("liger_kernel") is None
    or not (torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ),
    reason="no liger-kernel (pip install -e '.[kernels]'), or neither CUDA nor TRITON_INTERPRET=1",
)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def full_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ weight.T
    wide = torch.promote_types(logits.dtype, torch.float32)
    return cross_entropy(logits.to(wide), targets, reduction="sum")


def inputs(
    tokens: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, matrix and targets; the logits' spread is about 4."""
    draw = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, WIDTH, generator=draw)
    weight = torch.randn(VOCABULARY, WIDTH, generator=draw)
    targets = torch.randint(VOCABULARY, (tokens,), generator=draw)
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)


def gradients(
    loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor, trained: str = "body head"
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, and the gradients of FACTOR times it."""
    hidden = hidden.clone().requires_grad_("body" in trained)
    weight = weight.clone().requires_grad_("head" in trained)
    value = loss(hidden, weight, targets)
    (value * FACTOR).backward()
    return value.detach(), hidden.grad, weight.grad


def error(found: Tensor | None, exact: Tensor | None) -> float:
    """Largest difference, as a share of the largest exact number."""
    assert found is not None and exact is not None
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).abs().max() / exact.abs().max())


class LargestOutput(TorchDispatchMode):
    """Counts the numbers in the largest tensor that an operation allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and func._schema.returns[0].alias_info is None:  # no view
            self.numbers = max(self.numbers, made.numel())
        return made


@pytest.mark.parametrize("trained", ["body head", "body", "head"])
@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7])
def test_loss_and_gradients_are_those_of_full_logits(tokens: int, trained: str) -> None:
    value, hidden, weight = gradients(chunked_loss, *inputs(tokens), trained)
    exact = gradients(full_loss, *inputs(tokens), trained)
    assert value.dtype == torch.float32 and error(value, exact[0]) < 1e-6
    for found, wanted in ((hidden, exact[1]), (weight, exact[2])):
        assert (found is None) == (wanted is None)
        if found is not None:
            assert error(found, wanted) < 1e-6


def test_gradients_are_those_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phi3v.model.loss.CHUNK", 3)
    hidden, weight, targets = inputs(7, torch.float64)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert gradcheck(lambda h, w: FACTOR * chunked_loss(h, w, targets), leaves)


@pytest.mark.parametrize("trained", ["body head", "body", "head"])
def test_without_trained_tokens_the_loss_and_all_gradients_are_zero(trained: str) -> None:
    value, hidden, weight = gradients(chunked_loss, *inputs(0), trained)
    assert value == 0 and value.dtype == torch.float32
    if "body" in trained:
        assert hidden is not None and hidden.shape == (0, WIDTH)
    if "head" in trained:
        assert weight is not None and weight.shape == (VOCABULARY, WIDTH) and not weight.any()


def test_without_gradients_only_the_loss_is_made() -> None:
    hidden, weight, targets = inputs(CHUNK + 1)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        value = chunked_loss(*leaves, targets)
    assert not value.requires_grad
    assert counter.get_total_flops() == product(CHUNK + 1)
    assert error(value, full_loss(*leaves, targets)) < 1e-6


def product(tokens: int) -> int:
    """FLOPs of tokens x width x vocabulary."""
    return 2 * tokens * WIDTH * VOCABULARY


@pytest.mark.parametrize("trained, products", [("body head", 3), ("body", 2), ("head", 2)])
def test_no_product_is_computed_twice(trained: str, products: int) -> None:
    with FlopCounterMode(display=False) as counter:
        gradients(chunked_loss, *inputs(CHUNK + 1), trained)
    assert counter.get_total_flops() == products * product(CHUNK + 1)


def test_the_head_runs_once_behind_layers_that_are_computed_again() -> None:
    hidden, _, targets = inputs(CHUNK + 1)
    body = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())
    head = Head(WIDTH, VOCABULARY)
    with FlopCounterMode(display=False) as counter:
        again = checkpoint(body, hidden.requires_grad_(), use_reentrant=False)
        head(again, targets).backward()
    layer = 2 * (CHUNK + 1) * WIDTH * WIDTH
    assert counter.get_total_flops() == 4 * layer + 3 * product(CHUNK + 1)


def largest(loss: Loss, tokens: int, trained: str) -> int:
    """Numbers in the largest tensor of a training pass in bf16 at the published sizes.

    On the meta device, which computes shapes and types only, by the operations that CUDA takes.
    """
    sizes = (tokens, PUBLISHED_WIDTH), (PUBLISHED_VOCABULARY, PUBLISHED_WIDTH)
    hidden, weight = (torch.empty(n, dtype=torch.bfloat16, device="meta") for n in sizes)
    hidden.requires_grad_()
    weight.requires_grad_("head" in trained)
    with LargestOutput() as made:
        value = loss(hidden, weight, torch.empty(tokens, dtype=torch.long, device="meta"))
        (value * FACTOR).backward()
    return made.numbers


@pytest.mark.parametrize("tokens", [4096, 16384])
def test_no_tensor_grows_with_tokens_times_vocabulary(tokens: int) -> None:
    chunk, hidden = CHUNK * PUBLISHED_VOCABULARY, tokens * PUBLISHED_WIDTH
    weight = PUBLISHED_WIDTH * PUBLISHED_VOCABULARY
    assert largest(chunked_loss, tokens, "body head") == weight
    assert largest(chunked_loss, tokens, "body") == max(chunk, hidden)
    assert largest(full_loss, tokens, "body head") == tokens * PUBLISHED_VOCABULARY


def test_in_bf16_it_is_as_exact_as_full_logits() -> None:
    given = inputs(2 * CHUNK + 7, torch.bfloat16)
    found = gradients(chunked_loss, *given)
    assert_exact_in_bf16(found, *given)
    assert error(found[0], full_loss(*given)) < 1e-6  # its softmax is in float32, too


def assert_exact_in_bf16(
    found: tuple[Tensor, Tensor | None, Tensor | None],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
) -> None:
    """Measured on CPU against float64, largest error of loss, body's and head's gradient:

    full logits  2.0e-4, 9.0e-3, 2.5e-3
    chunked      2.0e-4, 9.0e-3, 3.2e-3
    Liger        2.0e-4, 1.2e-2, 6.4e-3
    """
    exact = gradients(full_loss, hidden.double(), weight.double(), targets)
    assert found[0].dtype == torch.float32 and error(found[0], exact[0]) < 4e-4
    for gradient, wanted in zip(found[1:], exact[1:], strict=True):
        assert gradient is not None and gradient.dtype == torch.bfloat16
        assert error(gradient, wanted) < 1.5e-2


def test_many_chunks_in_bf16_do_not_wear_the_gradient_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1,024 chunks: error 4.4e-3, and 3.2e-2 if they were added up in bf16."""
    monkeypatch.setattr("phi3v.model.loss.CHUNK", 1)
    given = inputs(CHUNK, torch.bfloat16)
    exact = gradients(full_loss, given[0].double(), given[1].double(), given[2])
    assert error(gradients(chunked_loss, *given)[2], exact[2]) < 1e-2


def test_each_position_predicts_the_next_token_of_its_own_sample() -> None:
    """Worked by hand: samples of 4, 1 and 3 tokens, whose labels are in part not trained."""
    none = IGNORED
    labels = torch.tensor([[10, 11, none, 13, 20, 30, 31, 32]])
    expected = [[11, none, 13, none, none, 31, 32, none]]
    assert next_tokens(labels, [4, 1, 3]).tolist() == expected
    assert next_tokens(labels, [8]).tolist() == [[11, none, 13, 20, 30, 31, 32, none]]
    assert labels.tolist() == [[10, 11, none, 13, 20, 30, 31, 32]]


def test_the_mean_loss_of_a_batch_is_that_of_its_next_tokens() -> None:
    """A model that is sure of the next token has no loss, of its own token a large one."""
    labels = torch.tensor([[3, 1, 4, 1], [IGNORED, 5, 2, IGNORED]])
    following = torch.tensor([[1, 4, 1, 0], [5, 2, 0, 0]])
    sure = torch.nn.functional.one_hot(following, 6) * 100.0
    assert mean_loss(sure, labels) < 1e-6
    wrong = sure.clone()
    wrong[0, 0] = 0  # one of the five that are trained is guessed
    assert mean_loss(wrong, labels).item() == pytest.approx(math.log(6) / 5)
    assert mean_loss(torch.randn(2, 4, 6), torch.full_like(labels, IGNORED)) == 0


def test_the_head_gives_logits_or_the_loss() -> None:
    hidden, weight, targets = inputs(5)
    head = Head(WIDTH, VOCABULARY)
    head.load_state_dict({"weight": weight})
    assert torch.equal(head(hidden[None]), (hidden @ weight.T)[None])
    assert error(head(hidden, targets), full_loss(hidden, weight, targets)) < 1e-6


@pytest.mark.parametrize("tokens, trained", [(0, "body head"), (5, "head")])
def test_the_head_does_not_give_liger_what_it_cannot_do(tokens: int, trained: str) -> None:
    hidden, _, targets = inputs(tokens)
    head = Head(WIDTH, VOCABULARY)
    head.loss = "liger"
    head(hidden.requires_grad_("body" in trained), targets).backward()
    assert head.weight.grad is not None and bool(head.weight.grad.any()) == bool(tokens)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("wanted", ["auto", "chunked"])
def test_our_own_loss_is_taken_unless_another_is_named(
    wanted: Literal["auto", "chunked"], device: str
) -> None:
    """Liger's, which waits for the device at each pack, even where it is installed."""
    assert choose_loss(wanted, torch.device(device)) == "chunked"


def test_liger_is_refused_without_cuda() -> None:
    with pytest.raises(ConfigError, match="model.loss is 'liger'.* this one is cpu; use 'auto'"):
        choose_loss("liger", CPU)


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="liger-kernel is installed")
def test_liger_is_refused_where_it_is_not_installed() -> None:
    with pytest.raises(ConfigError, match=r"not installed \(pip install -e '\.\[kernels\]'\); use"):
        choose_loss("liger", torch.device("cuda"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import no_such_triton", "ModuleNotFoundError: No module named 'no_such_triton'"),
        ("raise RuntimeError('0 active\\ndrivers')", "RuntimeError: 0 active; use"),
        ("raise OSError", "OSError: no message"),
    ],
)
def test_a_liger_that_cannot_be_imported_is_refused_in_a_line(
    line: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "liger_kernel").mkdir()
    (tmp_path / "liger_kernel" / "__init__.py").write_text(line)
    for name in [name for name in sys.modules if name.split(".")[0] == "liger_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as refusal:
        choose_loss("liger", torch.device("cuda"))
    assert f"`import liger_kernel` fails with {reason}" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("given", "dtypes"),
    [
        ((BF16, FP32, torch.int64), "a product of torch.bfloat16 and torch.float32"),
        ((BF16, BF16, torch.int32), "torch.int32"),
    ],
)
def test_dtypes_that_a_kernel_would_refuse_are_refused_everywhere(
    given: tuple[torch.dtype, ...], dtypes: str
) -> None:
    tensors = [t.to(dtype) for t, dtype in zip(inputs(5), given, strict=True)]
    with pytest.raises(AssertionError, match=dtypes):
        chunked_loss(*tensors)


@pytest.mark.parametrize(
    ("total", "left", "right"),
    [(BF16, FP32, FP32), (FP32, BF16, FP32), (torch.float64, BF16, BF16)],
)
def test_a_product_that_cuda_has_not_is_refused_everywhere(
    total: torch.dtype, left: torch.dtype, right: torch.dtype
) -> None:
    with pytest.raises(AssertionError, match=f"a product of {left} and {right} into {total}"):
        _add_product(
            torch.zeros(2, 2, dtype=total), *(torch.ones(2, 2, dtype=d) for d in (left, right))
        )


@needs_liger
def test_liger_is_chosen_where_it_is_installed() -> None:
    assert choose_loss("liger", torch.device("cuda")) == "liger"


@needs_liger
@pytest.mark.parametrize("trained", ["body head", "body"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_liger_gives_the_same_loss_and_gradients(tokens: int, trained: str) -> None:
    given = inputs(tokens, device=FASTEST)
    found = gradients(liger_loss, *given, trained)
    for ours, wanted in zip(found, gradients(full_loss, *given, trained), strict=True):
        assert (ours is None) == (wanted is None)
        assert ours is None or error(ours, wanted) < 1e-5


@needs_liger
def test_liger_in_bf16_is_as_exact_as_full_logits() -> None:
    given = inputs(200, torch.bfloat16, FASTEST)
    assert_exact_in_bf16(gradients(liger_loss, *given), *given)


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("liger_kernel") is None or find_spec("triton") is None,
    reason="no liger-kernel or triton (pip install -e '.[kernels]')",
)
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="runs in Triton's interpreter already")
def test_the_tests_of_liger_pass_in_tritons_interpreter() -> None:
    """Which computes on a CPU what a kernel would on a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", "liger", __file__]
    ran = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "nor TRITON_INTERPRET" not in ran.stdout, "Liger's tests were skipped"


@needs_cuda
def test_in_bf16_it_is_as_exact_on_cuda() -> None:
    given = inputs(2 * CHUNK + 7, torch.bfloat16, FASTEST)
    assert_exact_in_bf16(gradients(chunked_loss, *given), *given)


@needs_cuda
def test_on_cuda_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    peaks = []
    for tokens in (4096, 8192):
        hidden = torch.randn(tokens, WIDTH, dtype=torch.bfloat16, device=FASTEST)
        weight = torch.randn(PUBLISHED_VOCABULARY, WIDTH, dtype=torch.bfloat16, device=FASTEST)
        targets = torch.randint(PUBLISHED_VOCABULARY, (tokens,), device=FASTEST)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(chunked_loss, hidden, weight, targets)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] - peaks[0] < 4096 * PUBLISHED_VOCABULARY * 2 / 10  # a tenth of bf16 logits
