"""Phi-3-Vision at full size on one GPU: is it right, and how fast is it?

    python benchmarks/gpu.py [SECTION ...]

Sections: backends checks attention memory steps padded longest falls; default: all. One GPU of 80
GB or more. On a machine without one the same runs at toy size in float32, which shows that it runs
and says nothing of speed. Ends with a table; --out FOLDER keeps it, and a profile of a step.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fullsize import (
    PlainLoop,
    Scale,
    Timed,
    engine_settings,
    free,
    full,
    make_model,
    run_recipe,
    synchronize,
    time_packs,
    toy,
    variants,
)
from gpu_checks import check_all, measure_activations, time_attention
from mixture import alike
from padded import ROWS, PaddedRecipe, pad_rows
from timing import ROOT, describe_machine

from phi3v.config.schema import ModelSection
from phi3v.data import Dataset
from phi3v.data.batch import model_inputs
from phi3v.devices import has_cuda
from phi3v.errors import ConfigError
from phi3v.model.execution import Execution, choose_execution
from phi3v.training.ranks import RANK_VARIABLES, set_environment

TOO_MUCH = (torch.OutOfMemoryError, MemoryError)


@dataclass
class Bench:
    """What the sections share, and the lines that they have printed."""

    scale: Scale
    folder: Path
    out: Path
    steps: int
    lines: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.lines.append(text)

    def dataset(self, name: str) -> Dataset:
        path = self.folder / name
        if not path.exists():
            size = self.scale.sizes.image_size
            self.scale.data()[name].write(path, size, self.scale.vocabulary)
        return Dataset(path, "train")

    @property
    def execution(self) -> Execution:
        section = ModelSection(path="unused")
        return choose_execution(section, self.scale.device, self.scale.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=" ".join(SECTIONS))
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each kind")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    arguments = parser.parse_args()
    unknown = set(arguments.sections) - SECTIONS.keys()
    if unknown:
        parser.error(f"unknown section {sorted(unknown)[0]}; there are {' '.join(SECTIONS)}")
    set_environment()
    scale = full() if has_cuda() else toy()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(scale, Path(folder), arguments.out, arguments.steps)
        describe(bench)
        for name in arguments.sections or SECTIONS:
            bench.say(f"\n## {name}")
            SECTIONS[name](bench)
            free(scale.device)
    (arguments.out / "table.md").write_text("\n".join(bench.lines) + "\n", encoding="utf-8")


def describe(bench: Bench) -> None:
    bench.say(describe_machine())
    if bench.scale.device.type == "cuda":
        properties = torch.cuda.get_device_properties(bench.scale.device)
        bench.say(
            f"{properties.name}, {properties.total_memory / 1e9:.1f} GB, CUDA {torch.version.cuda}"
        )
    else:
        bench.say("no CUDA device: toy size in float32 on one thread, the times mean nothing")


def backends(bench: Bench) -> None:
    """What this machine has, and what `auto` takes."""
    for wanted in ("flash", "varlen", "sdpa"):
        bench.say(f"attention {wanted}: {_answer(lambda w=wanted: _choose(bench, attention=w))}")
    bench.say(f"loss liger: {_answer(lambda: _choose(bench, loss='liger'))}")
    bench.say(f"auto: {bench.execution}")


def _choose(bench: Bench, **wishes: Any) -> str:
    section = ModelSection(path="unused", **wishes)
    choose_execution(section, bench.scale.device, bench.scale.dtype)
    return "runs"


def _answer(question: Callable[[], str]) -> str:
    try:
        return question()
    except ConfigError as error:
        return str(error)


def checks(bench: Bench) -> None:
    """Backends, kernels, losses and recomputation give the same; a sample packed is as alone."""
    for line in check_all(bench.scale.device, bench.scale.dtype):
        bench.say(line)


def attention(bench: Bench) -> None:
    """Kernels beside each other, forward and backward, on a pack's samples and on views."""
    for line in time_attention(bench.scale):
        bench.say(line)


def memory(bench: Bench) -> None:
    """What a layer keeps for the backward pass, by the allocator's count."""
    for line in measure_activations(bench.scale):
        bench.say(line)


def steps(bench: Bench) -> None:
    """Steps of the engine under ZeRO-3, and of a plain loop, on pictures and on text."""
    best, engine = time_ways(bench)
    free(bench.scale.device)
    time_others(bench, best)  # in an engine of its own: after too much memory one is in any state
    free(bench.scale.device)
    plain = time_plain(bench, best)
    if plain and engine:
        ratio = np.median(engine.seconds) / np.median(plain.seconds)
        bench.say(f"ZeRO-3 over plain: {ratio:.3f} (asked: 1.05 at most)")


def time_ways(bench: Bench) -> tuple[Execution, Timed | None]:
    """Pictures under ZeRO-3, recomputing less and less while it fits; the last that did."""
    best, fastest = Execution(), None
    with engine_of(bench) as (engine, model):
        for execution in variants(bench.scale, bench.execution):
            model.set_execution(execution)
            timed = attempt(bench, "pictures", lambda batch: engine_step(engine, batch, bench))
            bench.say(f"ZeRO-3, pictures, {execution.checkpointing}: {show(bench, timed)}")
            if timed is None:
                break
            best, fastest = execution, timed
    return best, fastest


def time_others(bench: Bench, execution: Execution) -> None:
    """Text and the mixture under ZeRO-3, and a profile of a step on pictures."""
    with engine_of(bench) as (engine, model):
        model.set_execution(execution)
        for name in ("text", "mixture"):
            timed = attempt(bench, name, lambda batch: engine_step(engine, batch, bench))
            bench.say(f"ZeRO-3, {name}, {execution.checkpointing}: {show(bench, timed)}")
        profile_step(bench, lambda batch: engine_step(engine, batch, bench))


def time_plain(bench: Bench, execution: Execution) -> Timed | None:
    """Pictures in a loop of torch alone."""
    model = make_model(bench.scale)
    model.set_execution(execution)
    loop = PlainLoop(model)
    timed = attempt(bench, "pictures", lambda batch: plain_step(loop, model, batch, bench))
    bench.say(f"plain loop, pictures, {execution.checkpointing}: {show(bench, timed)}")
    return timed


@contextmanager
def engine_of(bench: Bench) -> Iterator[tuple[Any, Any]]:
    """The engine and its model while inside; both are freed behind it."""
    # DeepSpeed reads its environment when it is imported.
    from phi3v.training import zero
    from phi3v.training.optimizer import parameter_groups

    if not torch.distributed.is_initialized():
        zero.start_process_group()
    cfg = run_recipe(bench.folder, bench.folder, bench.scale)
    model = make_model(bench.scale)
    ds = engine_settings(bench.folder, bench.scale)
    engine = zero.build_engine(model, parameter_groups(model, cfg), ds)
    yield engine, model
    engine.destroy()
    del engine, model
    free(bench.scale.device)


def engine_step(engine: Any, batch: Any, bench: Bench) -> None:
    inputs = model_inputs(batch, bench.dataset("pictures").view_settings, bench.scale.device)
    engine.backward(engine(**inputs) / max(1, batch.label_tokens))
    engine.step()


def plain_step(loop: PlainLoop, model: Any, batch: Any, bench: Bench) -> None:
    inputs = model_inputs(batch, bench.dataset("pictures").view_settings, bench.scale.device)
    loop.step(model(**inputs) / max(1, batch.label_tokens))


def attempt(bench: Bench, name: str, step: Callable[[Any], None]) -> Timed | None:
    """Time steps on a dataset; None where memory does not suffice."""
    dataset = bench.dataset(name)
    cfg = run_recipe(bench.folder, dataset.folder, bench.scale)
    if name == "mixture":
        longest, most = int(dataset.tokens.max()), int(dataset.views.max())
        data = replace(
            cfg.data,
            max_tokens=max(longest, cfg.data.max_tokens),
            max_views=max(most, cfg.data.max_views),
        )
        cfg = replace(cfg, data=data)
    try:
        return time_packs(bench.scale, dataset, cfg, step, bench.steps)
    except TOO_MUCH:
        free(bench.scale.device)
        return None


def show(bench: Bench, timed: Timed | None) -> str:
    return timed.describe(bench.scale.device) if timed else "does not fit into memory"


def profile_step(bench: Bench, step: Callable[[Any], None]) -> None:
    """Write a trace of one step on pictures, and print where its time goes."""
    from phi3v.training.profile import profiled

    dataset = bench.dataset("pictures")
    cfg = run_recipe(bench.folder, dataset.folder, bench.scale)

    def watched(batch: Any) -> None:
        with profiled(bench.out / "profile", 1, (1,), 0):
            step(batch)
            synchronize(bench.scale.device)

    time_packs(bench.scale, dataset, cfg, watched, 1)
    bench.say(f"profile: {bench.out / 'profile'}")


def padded(bench: Bench) -> None:
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

    seconds = [elapsed(lambda b=batch: train(b), scale.device) for batch in batches[:1] + batches]
    tokens = sum(len(sample.input_ids) for sample in samples)
    usual_rate = tokens / sum(seconds[1:])
    bench.say(f"padded: {usual_rate:9,.0f} real tokens/s")
    for execution in variants(scale, bench.execution):
        model.set_execution(execution)
        ours = attempt(bench, "mixture", lambda batch: plain_step(loop, model, batch, bench))
        bench.say(f"packed, {execution.checkpointing}: {show(bench, ours)}")
        if ours is None:
            break
        bench.say(f"packed over padded: {ours.tokens_per_second / usual_rate:.2f} (asked: 2.5)")


def elapsed(call: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def longest(bench: Bench) -> None:
    """The longest single text that a step takes, doubling from a pack's tokens, under `full`."""
    scale = bench.scale
    limit = 1 << 20 if scale.is_full else 2 * scale.max_tokens
    with engine_of(bench) as (engine, model):
        model.set_execution(replace(bench.execution, checkpointing="full", offload=True))
        tokens, reached = scale.max_tokens, 0
        while tokens <= limit:
            name = f"long-{tokens}"
            mixture = alike(4, tokens // 2, tokens - tokens // 2, (), scale.config.image_side)
            mixture.write(bench.folder / name, scale.sizes.image_size, scale.vocabulary)
            dataset = Dataset(bench.folder / name, "train")
            cfg = run_recipe(bench.folder, dataset.folder, scale)
            cfg = replace(cfg, data=replace(cfg.data, max_tokens=tokens))
            try:
                time_packs(scale, dataset, cfg, lambda b: engine_step(engine, b, bench), 1)
            except TOO_MUCH:
                break
            reached, tokens = tokens, tokens * 2
    bench.say(f"longest pack: {reached:,} tokens, full recomputation, inputs in host memory")


def falls(bench: Bench) -> None:
    """The demo's own training on real shards: its loss must fall."""
    values = ["train.max_steps=20", "optim.warmup_steps=5", "eval.rows=0", "wandb.mode=disabled"]
    for command in (["products.py", "data/products", "--rows=120"], ["train.py", *values]):
        script = str(ROOT / "launch" / command[0])
        done = subprocess.run(
            [sys.executable, script, *command[1:]],
            cwd=bench.folder,
            env={k: v for k, v in os.environ.items() if k not in RANK_VARIABLES},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(done.stderr)
    text = (bench.folder / "runs/products/metrics.jsonl").read_text(encoding="utf-8")
    losses = [json.loads(line)["loss"] for line in text.splitlines()]
    bench.say(f"loss of 20 steps: {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0] - 1, losses


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "backends": backends,
    "checks": checks,
    "attention": attention,
    "memory": memory,
    "steps": steps,
    "padded": padded,
    "longest": longest,
    "falls": falls,
}

if __name__ == "__main__":
    main()
