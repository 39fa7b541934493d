"""The section `memory` of gpu.py: what a pack keeps on the device, beside its formula."""

from dataclasses import fields, replace

import torch
from fullsize import Bench, engine_settings, make_model, variants
from gpu_table import Findings

from phi3v.data.batch import Batch, collate, model_inputs
from phi3v.model import Phi3VForCausalLM
from phi3v.model.attention import SDPA
from phi3v.model.execution import Execution
from phi3v.training.memory import GpuUse, Pack, Sizes, gpu_memory

SHARE, SLACK = 0.02, 0.4e9  # how far apart: the allocator's rounding, the kernels' own


def expected_use(bench: Bench, tokens: int, views: int, execution: Execution) -> GpuUse:
    """What the formula says of a pack under `engine_settings`, every position trained."""
    pack = Pack(
        tokens=tokens,
        views=views,
        checkpointing=execution.checkpointing,
        tower_checkpointing=execution.vision_checkpointing,
        sdpa=execution.attention == SDPA,
    )
    ds = engine_settings(bench.folder, bench.scale, bench.ranks)
    return gpu_memory(Sizes.of(bench.scale.config), ds, pack)


def states_and_pack(bench: Bench, execution: Execution) -> str:
    """The expected peak of a step on pictures under stage 3, in words."""
    if not bench.scale.is_full:
        return ""
    dataset = bench.dataset("pictures")
    num = bench.scale.max_tokens // int(dataset.tokens.max())
    tokens, views = num * int(dataset.tokens[0]), num * int(dataset.views[0])
    use = expected_use(bench, tokens, views, execution)
    parts = (f"{getattr(use, part.name) / 1e9:.1f} {part.name}" for part in fields(use))
    return f"memory {use.total / 1e9:.1f} GB = {' + '.join(parts)}"


def memory(bench: Bench, findings: Findings) -> None:
    """Packs of text and of pictures by checkpointing mode: kept by the forward pass, and peak."""
    model = make_model(bench.scale)
    ways = [*variants(bench.scale, bench.execution)]
    ways.append(replace(ways[-1], vision_checkpointing="full"))
    for name in ("text", "pictures"):
        batch = full_pack(bench, name)
        run(bench, model, batch, ways[0])  # gradients are there, kernels are compiled
        for execution in ways if name == "pictures" else ways[:-1]:
            before = torch.cuda.memory_allocated()
            kept, peak = run(bench, model, batch, execution)
            views = sum(grid_views(bench, batch))
            use = expected_use(bench, batch.tokens, views, execution)
            expected = use.layers + use.edges + use.head
            how = f"{execution.checkpointing}, tower {execution.vision_checkpointing}"
            what = f"{name}, {batch.tokens:,} tokens, {views} views, {how}"
            findings.check(
                f"kept of {what}",
                abs(kept - expected) <= SHARE * expected + SLACK,
                f"{expected / 1e9:.1f} GB within {SHARE:.0%} and {SLACK / 1e9:.1f} GB",
                f"{kept / 1e9:.2f} GB",
            )
            whole = before + expected + use.working
            beside = f"{whole / 1e9:.1f} GB with {before / 1e9:.1f} before"
            findings.measured(f"peak of {what}", f"{peak / 1e9:.2f} GB", beside)


def full_pack(bench: Bench, name: str) -> Batch:
    """As many of a dataset's samples, all alike, as a pack holds."""
    dataset = bench.dataset(name)
    count = bench.scale.max_tokens // int(dataset.tokens.max())
    return collate([dataset[index] for index in range(count)])


def grid_views(bench: Bench, batch: Batch) -> list[int]:
    side = bench.scale.sizes.image_size
    return [c.shape[0] // side * (c.shape[1] // side) + 1 for c in batch.canvases]


def run(
    bench: Bench, model: Phi3VForCausalLM, batch: Batch, execution: Execution
) -> tuple[int, int]:
    """One forward and backward pass: bytes kept between the two, and the most in both."""
    model.set_execution(execution)
    settings = bench.dataset("pictures").view_settings
    inputs = model_inputs(batch, settings, bench.scale.device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = model(**inputs)
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    (loss / max(1, batch.label_tokens)).backward()
    torch.cuda.synchronize()
    return kept, torch.cuda.max_memory_allocated()
