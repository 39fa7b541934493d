"""The sections of gpu.py that time something: attention, steps, a save, the padded recipe, lengths.

Numbers are measured, and judged only where a goal is named.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from fullsize import (
    Bench,
    PlainLoop,
    Timed,
    make_loader,
    make_model,
    recipe_of,
    synchronize,
    time_packs,
    variants,
)
from gpu_checks import available
from gpu_memory import states_and_pack
from gpu_table import Findings
from mixture import alike
from padded import ROWS, PaddedRecipe, pad_rows
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from phi3v.data import Dataset
from phi3v.data.batch import Batch, model_inputs
from phi3v.data.packing import Position
from phi3v.model import Phi3VForCausalLM
from phi3v.model.attention import TOWER, Segments
from phi3v.model.execution import Execution

TOO_MUCH = (torch.OutOfMemoryError, MemoryError)
REPEATS = 5
LAYERS_OF_A_SAVE = 4  # of decoder and tower: of all, a save on one GPU would be 50 GB
SAVE_SECONDS = 40.0  # after which steps beside a save are no longer counted


def attention(bench: Bench, findings: Findings) -> None:
    """Kernels beside each other, forward and backward, on a pack's samples and on views."""
    scale, tower = bench.scale, bench.scale.config.vision_config
    longs, width = scale.max_tokens // scale.text, scale.config.hidden_size
    segments = Segments.of([scale.text] * longs, scale.device)
    heads = scale.config.num_attention_heads
    text = _states(bench, 1, heads, longs * scale.text, width // heads)
    flops = 3 * 2 * longs * scale.text**2 * width
    patches, views = (tower.image_size // tower.patch_size) ** 2 + 1, scale.grid.views * 4
    tower_width = tower.hidden_size // tower.num_attention_heads
    of_views = _states(bench, views, tower.num_attention_heads, patches, tower_width)
    view_flops = 3 * 4 * views * patches**2 * tower.hidden_size
    for name, kernel in available(scale.device, scale.dtype).items():
        seconds = seconds_of(partial(_attend, kernel, text, segments), scale.device)
        findings.measured(f"{name}, pack of {longs} x {scale.text}", _rate(seconds, flops))
        seconds = seconds_of(partial(_attend, TOWER[kernel], of_views, None), scale.device)
        findings.measured(f"{name}, {views} views", _rate(seconds, view_flops))


def _states(bench: Bench, rows: int, heads: int, tokens: int, width: int) -> list[Tensor]:
    shape, scale = (rows, tokens, heads, width), bench.scale
    return [
        torch.randn(shape, device=scale.device, dtype=scale.dtype).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]


def _attend(attention: str, states: list[Tensor], segments: Segments | None) -> None:
    arguments = {} if segments is None else {"segments": segments}
    scaling = states[0].shape[-1] ** -0.5
    attended, _ = ALL_ATTENTION_FUNCTIONS[attention](
        nn.Identity(), *states, None, scaling=scaling, **arguments
    )
    torch.autograd.grad(attended.sum(), states)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """The median of some calls, after two that are not counted."""
    taken = [elapsed(call, device) for _ in range(REPEATS + 2)]
    return sorted(taken[2:])[REPEATS // 2]


def elapsed(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def _rate(seconds: float, flops: float) -> str:
    return f"{seconds * 1e3:.2f} ms forward and backward, {flops / seconds / 1e12:.1f} TFLOP/s"


def steps(bench: Bench, findings: Findings) -> None:
    """Steps of the engine under ZeRO-3, and of a plain loop, on pictures and on text."""
    best, engine = _time_ways(bench, findings)
    _time_others(
        bench, findings, best
    )  # in another engine: after too much memory it is in any state
    plain = _time_plain(bench, findings, best)
    if plain and engine:
        ratio = float(np.median(engine.seconds) / np.median(plain.seconds))
        findings.measured("ZeRO-3 over plain", f"{ratio:.3f}", "at most 1.05")


def _time_ways(bench: Bench, findings: Findings) -> tuple[Execution, Timed | None]:
    """Pictures under ZeRO-3, recomputing less and less while it fits; the last that did."""
    best, fastest = Execution(), None
    with bench.engine() as (engine, model):
        for execution in variants(bench.scale, bench.execution):
            model.set_execution(execution)
            timed = attempt(bench, "pictures", partial(engine_step, bench, engine))
            beside = states_and_pack(bench, execution)
            name = f"ZeRO-3, pictures, {execution.checkpointing}"
            findings.measured(name, show(bench, timed), beside)
            if timed is None:
                break
            best, fastest = execution, timed
    return best, fastest


def _time_others(bench: Bench, findings: Findings, execution: Execution) -> None:
    """Text and the mixture under ZeRO-3, and a profile of a step on pictures."""
    with bench.engine() as (engine, model):
        model.set_execution(execution)
        step = partial(engine_step, bench, engine)
        for name in ("text", "mixture"):
            timed = attempt(bench, name, step)
            findings.measured(f"ZeRO-3, {name}, {execution.checkpointing}", show(bench, timed))
        _profile_step(bench, findings, step)


def _time_plain(bench: Bench, findings: Findings, execution: Execution) -> Timed | None:
    """Pictures in a loop of torch alone, every rank by itself."""
    model = make_model(bench.scale)
    model.set_execution(execution)
    loop = PlainLoop(model)
    timed = attempt(bench, "pictures", partial(plain_step, bench, loop, model))
    name = f"plain loop, pictures, {execution.checkpointing}"
    findings.measured(name, show(bench, timed))
    return timed


def engine_step(bench: Bench, engine: Any, batch: Batch) -> None:
    inputs = model_inputs(batch, bench.dataset("pictures").view_settings, bench.scale.device)
    engine.backward(engine(**inputs) / max(1, batch.label_tokens))
    engine.step()


def plain_step(bench: Bench, loop: PlainLoop, model: Phi3VForCausalLM, batch: Batch) -> None:
    inputs = model_inputs(batch, bench.dataset("pictures").view_settings, bench.scale.device)
    loop.step(model(**inputs) / max(1, batch.label_tokens))


def attempt(bench: Bench, name: str, step: Callable[[Batch], None]) -> Timed | None:
    """Time steps on a dataset; None where memory does not suffice."""
    dataset = bench.dataset(name)
    try:
        return time_packs(bench, dataset, recipe_of(bench, dataset), step, bench.steps)
    except TOO_MUCH:
        pass  # what its frames hold can be freed only behind the clause
    bench.free()
    return None


def show(bench: Bench, timed: Timed | None) -> str:
    return timed.describe(bench.scale.device) if timed else "does not fit into memory"


def _profile_step(bench: Bench, findings: Findings, step: Callable[[Batch], None]) -> None:
    """Write a trace of one step on pictures, and a table of where its time goes."""
    from phi3v.training.profile import profiled

    dataset = bench.dataset("pictures")

    def watched(batch: Batch) -> None:
        traced = (1,) if bench.ranks.is_first else ()
        with profiled(bench.out / "profile", 1, traced, bench.ranks.rank):
            step(batch)
            synchronize(bench.scale.device)

    time_packs(bench, dataset, recipe_of(bench, dataset), watched, 1)
    findings.measured("profile of a step", str(bench.out / "profile"))


def save(bench: Bench, findings: Findings) -> None:
    """Steps beside a save of a model of fewer layers, and steps without one."""
    sizes = replace(bench.scale.sizes, layers=LAYERS_OF_A_SAVE, vision_layers=LAYERS_OF_A_SAVE)
    bench = replace(bench, scale=replace(bench.scale, sizes=sizes))
    dataset = bench.dataset("pictures")
    cfg = recipe_of(bench, dataset)
    with bench.engine() as (engine, model):
        from phi3v.training.checkpoints.saving import Progress, Saver

        model.set_execution(bench.execution)
        folder = bench.folder / "checkpoints"
        saver = Saver(
            engine,
            folder,
            cfg.checkpoint,
            bench.ranks,
            {},
            device=bench.scale.device,
            offloaded=False,
            beat=lambda: None,
        )
        loader = make_loader(dataset, cfg, bench.ranks, bench.scale.device)
        coming = loader.steps(Position())

        def step(before: Callable[[], None] = lambda: None) -> None:
            before()
            for batch in loader.on_device(next(coming).batches):
                engine_step(bench, engine, batch)

        timed = partial(elapsed, device=bench.scale.device)
        timed(step), timed(step)
        saver.wait()  # for the memory of the copy
        without = [timed(step) for _ in range(max(3, 2 * bench.steps))]
        began = time.perf_counter()
        first = timed(partial(step, lambda: saver.save(Progress(1))))
        beside = []
        while _is_busy(saver) and time.perf_counter() - began < SAVE_SECONDS:
            beside.append(timed(step))
        saver.wait()
        written = time.perf_counter() - began
        coming.close()
    _judge_save(bench, findings, without, [first, *beside], written)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e9
    findings.measured("written", f"{size:.2f} GB of all ranks in {written:.1f} s")


def _is_busy(saver: Any) -> bool:
    """Whether any rank still writes: all must make the same number of steps."""
    from phi3v.training import zero

    return any(zero.gather_objects(saver.writer.is_busy))


def _judge_save(
    bench: Bench, findings: Findings, without: list[float], beside: list[float], written: float
) -> None:
    plain = float(np.median(without))
    lost = sum(beside) - plain * len(beside)
    ratio = float(np.median(beside)) / plain
    seen = (
        f"{np.median(beside) * 1e3:.1f} ms beside it, {plain * 1e3:.1f} without ({ratio:.2f}); "
        f"the first {beside[0] * 1e3:.1f}; {lost:.2f} s lost in all"
    )
    findings.check_time("a step beside a save", ratio <= 1.1, "at most 1.10 of one without", seen)


def padded(bench: Bench, findings: Findings) -> None:
    """The usual recipe (padded rows of four, zero slots, recomputation) on the same samples."""
    scale, dataset = bench.scale, bench.dataset("mixture")
    model = make_model(scale)
    loop = PlainLoop(model)
    samples = [dataset[index] for index in range(min(len(dataset), ROWS * bench.steps))]
    usual = PaddedRecipe(model)
    slots = scale.sizes.num_crops + 1
    rows = [samples[i : i + ROWS] for i in range(0, len(samples), ROWS)]
    batches = [pad_rows(row, dataset.view_settings, slots, 0, torch.device("cpu")) for row in rows]

    def train(batch: dict[str, Any]) -> None:
        moved = {
            k: v.to(scale.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()
        }
        loop.step(usual(**moved, recompute=True) / max(1, int((batch["labels"] >= 0).sum())))

    seconds = [elapsed(partial(train, batch), scale.device) for batch in batches[:1] + batches]
    tokens = sum(len(sample.input_ids) for sample in samples)
    usual_rate = tokens / sum(seconds[1:])
    findings.measured("padded", f"{usual_rate:,.0f} real tokens/s")
    for execution in variants(scale, bench.execution):
        model.set_execution(execution)
        ours = attempt(bench, "mixture", partial(plain_step, bench, loop, model))
        over = f"; {ours.tokens_per_second / usual_rate:.2f} of padded" if ours else ""
        name = f"packed, {execution.checkpointing}"
        findings.measured(name, show(bench, ours) + over, "2.5 of padded")
        if ours is None:
            break


def longest(bench: Bench, findings: Findings) -> None:
    """The longest single text that a step takes, doubling from a pack's tokens, under `full`."""
    scale, reached = bench.scale, 0
    limit = scale.sizes.positions if scale.is_full else scale.max_tokens
    with bench.engine() as (engine, model):
        model.set_execution(replace(bench.execution, checkpointing="full", offload=True))
        for tokens in itertools.takewhile(
            lambda n: n <= limit, (scale.max_tokens << i for i in itertools.count())
        ):
            if not _takes(bench, engine, tokens):
                break
            reached = tokens
    seen = f"{reached:,} tokens, full recomputation, inputs in host memory"
    findings.measured("longest pack", seen, f"{limit:,} tokens are the model's most")


def _takes(bench: Bench, engine: Any, tokens: int) -> bool:
    """Whether the engine makes steps on a text of so many tokens."""
    scale, folder = bench.scale, bench.folder / f"long-{tokens}-{bench.ranks.rank}" / "long"
    mixture = alike(4, tokens // 2, tokens - tokens // 2, (), scale.config.image_side)
    mixture.write(folder, scale.sizes.image_size, scale.vocabulary)
    dataset = Dataset(folder, "train")
    try:
        time_packs(
            bench, dataset, recipe_of(bench, dataset), partial(engine_step, bench, engine), 1
        )
    except TOO_MUCH:
        return False
    return True
