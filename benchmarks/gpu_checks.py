"""The sections of gpu.py that check numbers on one device: kernels, data, waits.

Kernels are held against the plainest way of computing the same; what is compared is the norm of the
difference over the norm of what is expected.
"""

import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fullsize import Bench, make_loader, recipe_of, synchronize
from gpu_table import Findings
from mixture import draw_mixture
from timing import ROOT
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from phi3v.data.batch import Batch, collate, model_inputs
from phi3v.data.packing import Position
from phi3v.errors import ConfigError
from phi3v.model import Phi3VForCausalLM
from phi3v.model.attention import TOWER, Segments, choose_attention
from phi3v.model.execution import Execution
from phi3v.model.loss import choose_loss, chunked_loss, liger_loss
from phi3v.sample import Sample
from phi3v.samples.tiny import TinySizes, tiny_config, train_tokenizer
from phi3v.views import ViewSettings, make_views

# Relative L2 of all gradients of a model: measured on a CPU, 5.5e-3 between attention in float32
# and in bf16. Of one function: bf16 keeps 8 bits, so a result is 2e-3 off, a gradient twice that; a
# sample that sees another's tokens is off by 0.3 and more. float32 on a CPU: 1e-6.
OF_A_MODEL = {torch.bfloat16: 3e-2, torch.float32: 1e-5}
OF_A_FUNCTION = {torch.bfloat16: 1.5e-2, torch.float32: 1e-5}
OF_A_LOSS = {torch.bfloat16: 5e-3, torch.float32: 1e-5}
LENGTHS = (1, 7, 64, 129, 311)  # of a pack: less than a tile of the kernels, more, and neither
SETTINGS = ViewSettings(56, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
OF_A_THUMBNAIL = 1e-5  # of values of up to 4: sums of 16 products in another order

# What may make the host wait in a micro-step: words of "operation at place", and the reason.
ALLOWED: dict[str, str] = {}
WAITS = "called a synchronizing CUDA operation"  # torch's c10/cuda/CUDAFunctions.cpp


def available(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The attention backends that run here, with their registered names."""
    found = {}
    for wanted in ("sdpa", "varlen", "flash"):
        try:
            found[wanted] = choose_attention(wanted, device, dtype)
        except ConfigError:
            continue
    return found


def kernels(bench: Bench, findings: Findings) -> None:
    """Every backend, kernel, loss and mode of recomputation gives the same."""
    torch.manual_seed(0)
    device, dtype = bench.scale.device, bench.scale.dtype
    findings.measured("auto", str(bench.execution))
    for name in ("sdpa", "varlen", "flash"):
        if name in available(device, dtype):
            check_attention(bench, findings, name)
        else:
            findings.skipped(f"attention {name}", refusal(name, device, dtype))
    check_losses(bench, findings)
    small = Small(bench)
    check_ways(small, findings)
    check_packing(small, findings)
    check_repetition(small, findings)


def refusal(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why an attention backend does not run here."""
    try:
        choose_attention(name, device, dtype)
    except ConfigError as error:
        return str(error).partition(": ")[2].partition(";")[0]
    return ""


def far(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference of all tensors, as a share of the norm of those expected."""
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(found, expected, strict=True)]
    difference = sum(float((a - b).square().sum()) for a, b in pairs)
    return float((difference / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5)


def check_attention(bench: Bench, findings: Findings, name: str) -> None:
    """A kernel on a pack and on views, beside a softmax in float64 of each sample alone."""
    registered = available(bench.scale.device, bench.scale.dtype)[name]
    tokens = sum(LENGTHS)
    cases = {
        f"attention {name}, packed as alone": (registered, (1, 4, tokens, 96), LENGTHS, True),
        f"attention {name}, views": (TOWER[registered], (3, 4, 577, 64), (577,), False),
    }
    limit = OF_A_FUNCTION[bench.scale.dtype]
    for case, (function, shape, lengths, is_causal) in cases.items():
        states = [_leaf(shape, bench) for _ in range(3)]
        upstream = torch.randn_like(states[0].transpose(1, 2))  # (B, T, H, K)
        arguments = {"segments": Segments.of(lengths, bench.scale.device)} if is_causal else {}
        scaling = shape[-1] ** -0.5
        attended, _ = ALL_ATTENTION_FUNCTIONS[function](
            nn.Identity(), *states, None, scaling=scaling, **arguments
        )
        found = torch.autograd.grad(attended, states, upstream)
        wide = [state.detach().double().cpu().requires_grad_() for state in states]
        alone = softmax_attention(wide, lengths, is_causal)
        expected = torch.autograd.grad(alone, wide, upstream.double().cpu())
        distances = [far([attended.detach()], [alone.detach()]), far(found, expected)]
        findings.check(case, max(distances) < limit, f"< {limit:.1e}", _apart(*distances))


def _leaf(shape: tuple[int, ...], bench: Bench) -> Tensor:
    values = torch.randn(shape, device=bench.scale.device, dtype=bench.scale.dtype)
    return values.requires_grad_()


def softmax_attention(states: Sequence[Tensor], lengths: Sequence[int], is_causal: bool) -> Tensor:
    """Attention as its formula has it, sample by sample: (B, H, T, K) -> (B, T, H, K)."""
    parts = []
    for q, k, v in zip(*(state.split(tuple(lengths), dim=2) for state in states), strict=True):
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if is_causal:
            later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        parts.append(scores.softmax(-1) @ v)
    return torch.cat(parts, dim=2).transpose(1, 2)


def _apart(forward: float, gradients: float) -> str:
    return f"forward {forward:.1e}, gradients {gradients:.1e} apart"


def check_losses(bench: Bench, findings: Findings) -> None:
    """What makes the loss, beside the cross entropy of whole logits in float64 or float32."""
    scale, width = bench.scale, bench.scale.config.hidden_size
    tokens = 2500 if scale.is_full else 100  # more than two chunks
    hidden = _leaf((tokens, width), bench)
    weight = (torch.randn(scale.vocabulary, width, device=scale.device) * 0.02).to(scale.dtype)
    weight.requires_grad_()
    targets = torch.randint(scale.vocabulary, (tokens,), device=scale.device)
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    loss = nn.functional.cross_entropy(wide[0] @ wide[1].T, targets, reduction="sum")
    expected = torch.autograd.grad(loss, wide)
    ways: dict[str, Callable[..., Tensor]] = {"chunked": chunked_loss}
    if obstacle := obstacle_to_liger(scale.device):
        findings.skipped("loss liger", obstacle)
    else:
        ways["liger"] = liger_loss
    limit = OF_A_FUNCTION[scale.dtype]
    for name, way in ways.items():
        other = way(hidden, weight, targets)
        found = torch.autograd.grad(other, (hidden, weight))
        distances = float(abs(other.detach() - loss.detach()) / loss.detach()), far(found, expected)
        findings.check(
            f"loss {name}",
            max(distances) < limit and distances[0] < OF_A_LOSS[scale.dtype],
            f"< {limit:.1e}, forward < {OF_A_LOSS[scale.dtype]:.0e}",
            _apart(*distances),
        )


def obstacle_to_liger(device: torch.device) -> str | None:
    """Why Liger's loss cannot be had here, or None."""
    try:
        choose_loss("liger", device)
    except ConfigError as error:
        return str(error).partition(": ")[2].partition(";")[0]
    return None


class Small:
    """A small model of the published head widths on the device, samples for it, its gradients."""

    def __init__(self, bench: Bench) -> None:
        self.device, self.dtype = bench.scale.device, bench.scale.dtype
        wide = {"width": 384, "mlp_width": 1024, "vision_width": 256}
        sizes = TinySizes(**wide if bench.scale.is_full else {})
        self.model = Phi3VForCausalLM(tiny_config(sizes, train_tokenizer(["a b"], 2)))
        self.model = self.model.to(self.device, self.dtype).train()
        config = self.model.config
        mixture = draw_mixture(6, 4, 3, config.image_side, (10, 10))
        self.samples = list(mixture.samples(SETTINGS.crop_size, config.vocab_size))
        self.plain = Execution()

    def gradients(self, execution: Execution, packs: Sequence[Sequence[Sample]]) -> list[Tensor]:
        """The loss of some packs together, and then the gradients of all parameters."""
        self.model.set_execution(execution)
        self.model.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for pack in packs:
            loss = self.model(**model_inputs(collate(pack), SETTINGS, self.device))
            loss.backward()
            total += loss.detach()
        return [total, *(p.grad for p in self.model.parameters() if p.grad is not None)]

    def compare(
        self, findings: Findings, name: str, found: Sequence[Tensor], expected: Sequence[Tensor]
    ) -> None:
        loss, gradients = far(found[:1], expected[:1]), far(found[1:], expected[1:])
        limit, limit_loss = OF_A_MODEL[self.dtype], OF_A_LOSS[self.dtype]
        is_true = gradients < limit and loss < limit_loss
        wanted = f"< {limit:.0e}, forward < {limit_loss:.0e}"
        findings.check(name, is_true, wanted, _apart(loss, gradients))


def check_ways(small: Small, findings: Findings) -> None:
    """Whole models that compute in different ways."""
    plain = small.plain
    ways = {
        f"model, attention {name}": replace(plain, attention=attention)
        for name, attention in available(small.device, small.dtype).items()
        if attention != plain.attention
    }
    for how in ("selective", "full"):
        ways[f"model, checkpointing {how}"] = replace(
            plain, checkpointing=how, vision_checkpointing=how
        )
    ways["model, full and offloaded"] = replace(ways["model, checkpointing full"], offload=True)
    if not obstacle_to_liger(small.device):
        ways["model, loss liger"] = replace(plain, loss="liger")
    expected = small.gradients(plain, [small.samples])
    for name, execution in ways.items():
        small.compare(findings, name, small.gradients(execution, [small.samples]), expected)
    if small.device.type == "cuda":
        check_fused(small, findings, expected)
    else:
        findings.skipped("model, fused as eager", "needs CUDA (tests do it with a C++ compiler)")


def check_fused(small: Small, findings: Findings, expected: Sequence[Tensor]) -> None:
    """Kernels of torch.compile: what they compute, and how long they are in the making."""
    fused, seconds = replace(small.plain, compiled=True), []
    for _ in range(2):
        began = time.perf_counter()
        found = small.gradients(fused, [small.samples])
        synchronize(small.device)
        seconds.append(time.perf_counter() - began)
    small.compare(findings, "model, fused as eager", found, expected)
    findings.measured("kernels are compiled", f"in {seconds[0] - seconds[1]:.1f} s")


def check_packing(small: Small, findings: Findings) -> None:
    """All samples in one pack, and each in a pack of its own."""
    for name, attention in available(small.device, small.dtype).items():
        execution = replace(small.plain, attention=attention)
        packed = small.gradients(execution, [small.samples])
        alone = small.gradients(execution, [[sample] for sample in small.samples])
        small.compare(findings, f"model, packed as alone, {name}", packed, alone)


def check_repetition(small: Small, findings: Findings) -> None:
    """debug.deterministic: the same bits twice, by what `auto` takes."""
    attention = choose_attention("auto", small.device, small.dtype)
    execution = replace(small.plain, attention=attention)
    torch.use_deterministic_algorithms(True)
    try:
        one, other = (small.gradients(execution, [small.samples]) for _ in range(2))
        differing = sum(not a.equal(b) for a, b in zip(one, other, strict=True))
        seen = f"{differing} of {len(one)} tensors differ"
    except RuntimeError as error:  # an operation without a deterministic kernel
        differing, seen = 1, str(error).splitlines()[0]
    finally:
        torch.use_deterministic_algorithms(False)
    findings.check("debug.deterministic, twice", not differing, "the same bits", seen)


def data(bench: Bench, findings: Findings) -> None:
    """What the loader hands to the device, and the views that are made there."""
    dataset, device = bench.dataset("mixture"), bench.scale.device
    loader = make_loader(dataset, recipe_of(bench, dataset), bench.ranks, device)
    coming = loader.steps(Position())
    differing, count = [], 12  # more steps than there are arenas, which are used again
    for number in range(count):
        planned = next(coming)
        direct = collate([dataset[int(index)] for index in planned.packs[bench.ranks.rank]])
        for batch in loader.on_device(planned.batches):
            if not same_batch(batch, direct):
                differing.append(number)
    is_pinned = planned.batches[0].input_ids.is_pinned() if device.type == "cuda" else None
    coming.close()
    seen = f"{len(differing)} of {count} differ" + ("" if is_pinned is None else ", pinned")
    how = "through pinned memory" if is_pinned else "through arenas"
    findings.check(f"packs {how}", not differing, "as read one by one", seen)
    if is_pinned is False:
        findings.check("memory of the loader", False, "pinned", "not pinned")
    check_views(bench, findings)


def same_batch(one: Batch, other: Batch) -> bool:
    """Whether two batches hold the same, wherever it lies."""
    names = [(b.ids, b.segment_lengths, len(b.canvases)) for b in (one, other)]
    tensors = [(b.input_ids, b.labels, *b.canvases) for b in (one, other)]
    return names[0] == names[1] and all(
        a.cpu().equal(b.cpu()) for a, b in zip(*tensors, strict=True)
    )


def check_views(bench: Bench, findings: Findings) -> None:
    """Views made on the device beside those made on the CPU, which are the processor's."""
    device, dataset = bench.scale.device, bench.dataset("pictures")
    if device.type != "cuda":
        findings.skipped("views made on the device", "needs CUDA")
        return
    canvas, settings = collate([dataset[0]]).canvases[0], dataset.view_settings
    found, expected = make_views(canvas.to(device), settings).cpu(), make_views(canvas, settings)
    differing = int((found[1:] != expected[1:]).sum())
    findings.check(
        "crops made on the device", not differing, "the CPU's bits", f"{differing} differ"
    )
    apart = float((found[0] - expected[0]).abs().max())
    seen = "the CPU's bits" if found[0].equal(expected[0]) else f"{apart:.1e} apart"
    wanted = f"within {OF_A_THUMBNAIL:.0e}: sums in another order"
    findings.check("thumbnail made on the device", apart <= OF_A_THUMBNAIL, wanted, seen)


class Waits(TorchDispatchMode):
    """Notes which operations let the host wait for the device, and lets them.

    found     "operation at place", in order; of a backward pass the place is where it was called
    set_mode  torch.cuda.set_sync_debug_mode: an operation is tried with waiting an error, and done
              again without. What waits below the dispatcher, as torch.tensor(..., device="cuda")
              does, warns instead. Not seen: torch.cuda.synchronize and the like, called by name.
    """

    def __init__(self, set_mode: Callable[[str], None]) -> None:
        super().__init__()
        self.found: list[str] = []
        self._set_mode = set_mode

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # otherwise torch.compile would not run below this mode

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._set_mode("error")
        try:
            return op(*args, **(kwargs or {}))
        except RuntimeError as error:
            if WAITS not in str(error):
                raise
            self.found.append(f"{op} at {place()}")
            self._set_mode("default")
            return op(*args, **(kwargs or {}))
        finally:
            self._set_mode("warn")


def place() -> str:
    """The innermost line of the project on the stack."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT / "phi3v"):
            return f"{path.relative_to(ROOT)}:{frame.lineno} {frame.name}"
    return "the backward pass"


def waits_of(call: Callable[[], object], set_mode: Callable[[str], None]) -> list[str]:
    """What lets the host wait in a call."""
    found: list[str] = []

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if WAITS in str(message):
            found.append(f"below the dispatcher at {place()}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        with Waits(set_mode) as mode:
            set_mode("warn")
            try:
                call()
            finally:
                set_mode("default")
    return mode.found + found


def waits(bench: Bench, findings: Findings) -> None:
    """The host waits for the device nowhere in a packed micro-step, but where it is allowed to."""
    small = Small(bench)
    batch = collate(small.samples)

    def micro_step() -> None:
        model_loss = small.model(**model_inputs(batch, SETTINGS, small.device))
        (model_loss / 7).backward()

    for name, execution in _executions(bench, small):
        small.model.set_execution(execution)
        micro_step()  # what is made once is made, gradients are there
        torch.cuda.synchronize()
        found = waits_of(micro_step, torch.cuda.set_sync_debug_mode)
        unlisted = [wait for wait in found if not any(words in wait for words in ALLOWED)]
        seen = "; ".join(unlisted) or f"none, {len(found)} listed"
        findings.check(f"unlisted waits, {name}", not unlisted, "none", seen)


def _executions(bench: Bench, small: Small) -> Iterator[tuple[str, Execution]]:
    chosen = bench.execution
    for name, attention in available(small.device, small.dtype).items():
        yield f"attention {name}", replace(chosen, attention=attention)
    yield (
        "full, offloaded",
        replace(chosen, checkpointing="full", vision_checkpointing="full", offload=True),
    )
    yield "eager", replace(chosen, compiled=False)
