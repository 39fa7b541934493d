"""The section `memory` of gpu.py: what a pack keeps on the device, beside its formula."""

from dataclasses import replace

import torch
from fullsize import Bench, make_model, variants
from gpu_table import Findings

from phi3v.data.batch import Batch, collate, model_inputs
from phi3v.model import Phi3VForCausalLM
from phi3v.model.execution import Execution

# Bytes per token that a layer of the published model keeps (docs/performance.md).
DECODER = {"none": 82_440, "selective": 69_760, "full": 6_144}
TOWER = {"none": 24_648, "selective": 20_544, "full": 2_048}
HEAD = 0.4e9  # the head's gradient in float32, which waits there from the forward pass
SHARE, SLACK = 0.02, 0.4e9  # how far apart: inputs, rotary angles, the allocator's rounding
WORKING = 1.5e9  # the layer that is computed again, a chunk of logits, the kernels' own
BUFFERS = 6.0e9  # of stage 3 as shipped


def kept_bytes(tokens: int, views: int, execution: Execution) -> float:
    """What the forward pass of a pack keeps for the backward pass, at the published sizes."""
    decoder = 32 * DECODER[execution.checkpointing] * tokens
    return decoder + 23 * 577 * TOWER[execution.vision_checkpointing] * views + HEAD


def state_bytes(parameters: int, ranks: int) -> float:
    """Weights, gradients and optimizer under stage 3, as `engine_settings` has them."""
    return parameters * (16 if ranks == 1 else 18 / ranks)


def states_and_pack(bench: Bench, execution: Execution) -> str:
    """The expected peak of a step on pictures under stage 3, in words."""
    if not bench.scale.is_full:
        return ""
    dataset = bench.dataset("pictures")
    num = bench.scale.max_tokens // int(dataset.tokens.max())
    pack = kept_bytes(num * int(dataset.tokens[0]), num * int(dataset.views[0]), execution)
    states = state_bytes(4_146_621_440, bench.ranks.world_size)
    whole = (states + BUFFERS + pack + WORKING) / 1e9
    return (
        f"memory {whole:.1f} GB = {states / 1e9:.1f} states + 7.5 buffers + {pack / 1e9:.1f} pack"
    )


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
            expected = kept_bytes(batch.tokens, views, execution)
            how = f"{execution.checkpointing}, tower {execution.vision_checkpointing}"
            what = f"{name}, {batch.tokens:,} tokens, {views} views, {how}"
            findings.check(
                f"kept of {what}",
                abs(kept - expected) <= SHARE * expected + SLACK,
                f"{expected / 1e9:.1f} GB within {SHARE:.0%} and {SLACK / 1e9:.1f} GB",
                f"{kept / 1e9:.2f} GB",
            )
            beside = f"{(before + expected + WORKING) / 1e9:.1f} GB with {before / 1e9:.1f} before"
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
