"""Forward and backward passes of the full-size model on a CUDA device that is not there.

    python -m tests.cuda.stub STUB tests.cuda.passes      # prints JSON: see `main`

The pack is the one of docs/performance.md: 8,192 tokens, four pictures of 1344 x 1008 (52 views).
What does not depend on depth is asked of a model of two layers of that width.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tests.cuda.flash as flash  # before phi3v, which looks for its operators
from phi3v.config import Module
from phi3v.config.schema import Checkpointing
from phi3v.data.batch import Arena, Batch, collate, model_inputs, row_bytes
from phi3v.data.loader import Loader
from phi3v.geometry import Grid, image_tokens
from phi3v.model import Phi3VConfig, Phi3VForCausalLM, attention, loss, phi3v, rotary
from phi3v.model.attention import Segments, choose_attention
from phi3v.model.checkpointing import run_layer
from phi3v.model.execution import Execution
from phi3v.sample import IGNORED, Canvas, Sample
from phi3v.training import loop
from phi3v.training.optimizer import freeze
from phi3v.views import ViewSettings
from tests.cuda.device import CUDA, FakeDevice
from tests.model.test_configuration import PUBLISHED

SETTINGS = ViewSettings(336, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
PAGE = Grid(3, 4)  # 1344 x 1008 pixels, 13 views, 1,921 tokens
SHORT = {"num_hidden_layers": 2, "vision_config": {"num_hidden_layers": 3}}
WAYS: tuple[Checkpointing, ...] = ("none", "selective", "full")
TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pass; `pack` is a key of `PACKS`."""

    attention: str = "varlen"
    checkpointing: Checkpointing = "none"
    vision_checkpointing: Checkpointing = "none"
    pack: str = "pictures"
    offload: bool = False
    frozen: tuple[Module, ...] = ()

    def __str__(self) -> str:
        values = asdict(self).items()
        return " ".join(f"{key}={value}" for key, value in values if value not in (False, ()))


def draw(name: str, text: int, *grids: Grid) -> Sample:
    """The pictures of a sample, then its text, of which the second half is trained."""
    pieces = [np.full(image_tokens(grid, 12), -k, np.int32) for k, grid in enumerate(grids, 1)]
    ids = np.concatenate([*pieces, np.full(text, 7, np.int32)])
    labels = np.full_like(ids, IGNORED)
    labels[len(ids) - text // 2 :] = 7
    sizes = [(336 * grid.rows, 336 * grid.cols, 3) for grid in grids]
    return Sample(name, ids, labels, tuple(Canvas(np.zeros(s, np.uint8)) for s in sizes), {})


PACKS = {
    "pictures": [draw(name, 2048 - 1921, PAGE) for name in "abcd"],
    "text": [draw(name, 2048) for name in "abcd"],
    "several pictures": [draw("a", 90, PAGE, Grid(1, 2)), draw("b", 500), draw("c", 9, Grid(2, 1))],
    "nothing trained": [],
}


def to_pinned(samples: list[Sample]) -> Batch:
    """As the loader's threads lay them in pinned memory."""
    arena = Arena(CUDA)
    tokens = sum(len(sample.input_ids) for sample in samples)
    pixels = sum(canvas.pixels.nbytes for sample in samples for canvas in sample.images)
    arena.reset(row_bytes(tokens) + pixels)
    return collate(samples, arena)


def scaled_dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
) -> Tensor:
    """What torch would choose here by the properties of a device, of which this one has none."""
    assert mask is None and not enable_gqa
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    return kernel(query, key, value, 0.0, is_causal, scale=scale)[0]


def pretend_a_gpu() -> None:
    """Of the kind for which flash-attn 2 is made, with the package."""
    torch.cuda.get_device_capability = lambda device=None: (8, 0)
    torch.backends.cuda.is_flash_attention_available = lambda: True
    attention.FLASH_2, attention.FLASH_3 = flash.PACKAGE, None
    attention.scaled_dot_product_attention = scaled_dot_product


class Bench:
    """The model on the device; gradients go on at once, as ZeRO-3 has it.

    `before` are the bytes on the device between two passes.
    """

    def __init__(self, config: Phi3VConfig, gpu: FakeDevice) -> None:
        self.gpu = gpu
        with torch.device("meta"):
            model = Phi3VForCausalLM(config).to(torch.bfloat16)
        with self.gpu:
            self.model = model.to_empty(device=CUDA).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        self.batches = {name: to_pinned(samples) for name, samples in PACKS.items()}
        self.before = 0
        self.pass_(Case(pack="several pictures"))  # makes what is made once
        self.before = self.gpu.live

    def prepare(self, case: Case) -> None:
        for parameter in self.trained:
            parameter.requires_grad_(True)
        freeze(self.model, case.frozen)
        execution = Execution(
            attention=choose_attention(case.attention, CUDA, torch.bfloat16),
            checkpointing=case.checkpointing,
            vision_checkpointing=case.vision_checkpointing,
            offload=case.offload,
        )
        self.model.set_execution(execution)
        self.gpu.waits.clear()
        self.gpu.peak = self.gpu.live

    def pass_(self, case: Case) -> dict[str, Any]:
        """Forward and backward; bytes beyond `before`, and what the host waited for."""
        self.prepare(case)
        with self.gpu:
            value = self.model(**model_inputs(self.batches[case.pack], SETTINGS, CUDA))
            kept = self.gpu.live - self.before
            value.backward()
            del value
        found = {"kept": kept, "peak": self.gpu.peak - self.before, "waits": dict(self.gpu.waits)}
        return found | {"left": self.gpu.live - self.before}

    def layer_bytes(self, wanted: str, kind: str, how: Checkpointing) -> float:
        """What a layer keeps of a token: of the pack for the decoder, of its views for the tower.

        Measured as what a second layer keeps, since cosine and sine are every layer's.
        """
        self.prepare(Case(attention=wanted))
        core = self.model.model
        if kind == "decoder":
            layer, shape = core.layers[0], (1, TOKENS, 3072)
        else:
            tower = core.vision_embed_tokens.img_processor.vision_model
            layer, shape = tower.encoder.layers[0], (52, 577, 1024)
        kept = []
        with self.gpu:
            rest: dict[str, Any] = {}
            if kind == "decoder":
                segments = Segments.of([2048] * 4, CUDA)
                angles = core.packed_angles(segments, torch.bfloat16)
                rest = {"segments": segments, "position_embeddings": angles}
            for depth in (1, 2):
                hidden = torch.empty(shape, dtype=torch.bfloat16, device=CUDA, requires_grad=True)
                before = self.gpu.live
                for _ in range(depth):
                    hidden = run_layer(layer, how, False, hidden, attention_mask=None, **rest)
                kept.append(self.gpu.live - before)
                del hidden
        return (kept[1] - kept[0]) / (shape[0] * shape[1])

    def step(self) -> dict[str, int]:
        """What the host waits for in an optimizer step of two packs, but for DeepSpeed's part."""
        self.prepare(Case())
        names = ("pictures", "text")
        trained = np.array([self.batches[name].label_tokens for name in names])
        run = SimpleNamespace(
            dataset=SimpleNamespace(label_tokens=trained, view_settings=SETTINGS),
            ranks=SimpleNamespace(world_size=8),
            ds=SimpleNamespace(accumulation=2),
            device=CUDA,
        )
        loader = object.__new__(Loader)  # without its stream, of which there is none
        loader.device, loader._copies = CUDA, None
        step = SimpleNamespace(packs=[0, 1], batches=[self.batches[name] for name in names])
        loop.zero.sum_over_ranks = lambda sums: None
        loop.zero.gradient_norms = lambda engine: (1.0, {})
        with self.gpu:
            loop.train_step(run, Engine(self.model), loader, step, {}, limit=9.0)
        return dict(self.gpu.waits)


class Engine:
    """As much of DeepSpeed's as a step calls."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.optimizer = module, SimpleNamespace(param_groups=[])

    def __call__(self, **inputs: Any) -> Tensor:
        return self.module(**inputs)

    def backward(self, value: Tensor) -> None:
        value.backward()

    def step(self) -> None:
        pass


CASES = [
    *(
        Case(attention=name, checkpointing=how, vision_checkpointing=how)
        for name in ("varlen", "flash", "sdpa")
        for how in WAYS
    ),
    Case(vision_checkpointing="full"),
    Case(checkpointing="full", vision_checkpointing="selective"),
    *(Case(pack="text", checkpointing=how, vision_checkpointing=how) for how in WAYS),
    *(Case(attention=name, pack="several pictures") for name in ("varlen", "flash", "sdpa")),
    Case(pack="nothing trained"),
    Case(checkpointing="full", vision_checkpointing="full", offload=True),
    Case(frozen=("vision",)),
    Case(frozen=("vision", "projector", "embeddings"), checkpointing="full"),
    Case(frozen=("language", "embeddings", "head"), checkpointing="selective"),
]


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def angles_on_host(self: Any, segments: Segments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    places = torch.cat([torch.arange(length) for length in segments.lengths])
    return rotary.rotary(self.config, places[None], False, dtype)


def wide_angles(self: Any, segments: Segments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return ANGLES(self, segments, torch.float32)


def places_on_host(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if tensor.dtype == torch.int64 and tensor.dim() == 1 else SEND(tensor, device)


def reading_the_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    value = CHUNKED(hidden, weight, targets)
    return value if value.item() >= 0 else -value


ANGLES, SEND, CHUNKED = phi3v.Phi3VModel.packed_angles, phi3v.send, loss.chunked_loss
FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "angles on the host": (phi3v.Phi3VModel, "packed_angles", angles_on_host),
    "angles in float32": (phi3v.Phi3VModel, "packed_angles", wide_angles),
    "places on the host": (phi3v, "send", places_on_host),
    "reading the loss": (loss, "chunked_loss", reading_the_loss),
    "copying from memory that is not pinned": (
        *(phi3v, "send"),
        lambda tensor, device: tensor.to(device, non_blocking=True),
    ),
}


def seed(bench: Bench, fault: str) -> dict[str, Any]:
    """What a fault is seen by: an error, or waits."""
    with replaced(*FAULTS[fault]):
        try:
            return bench.pass_(Case(pack="several pictures"))
        except (RuntimeError, AssertionError) as error:
            return {"raised": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Print what every case, every kind of layer, a step and every fault shows."""
    pretend_a_gpu()
    gpu = FakeDevice()
    bench = Bench(Phi3VConfig.from_dict(PUBLISHED), gpu)
    cases = {str(case): bench.pass_(case) for case in CASES}
    short = Bench(Phi3VConfig.from_dict(PUBLISHED | SHORT), gpu)
    layers = {
        f"{kind} {name} {how}": short.layer_bytes(name, kind, how)
        for kind in ("decoder", "tower")
        for name in ("varlen", "flash", "sdpa")
        for how in WAYS
    }
    step = short.step()
    faults = {fault: seed(short, fault) for fault in FAULTS}
    print(json.dumps({"cases": cases, "layers": layers, "step": step, "faults": faults}))


if __name__ == "__main__":
    main()
