"""Weights to safetensors files, with one tensor in memory at a time.

A file is the length of its header in eight bytes, the header (JSON: dtype, shape and place of every
tensor), and the tensors' bytes end to end. The header is filled up with spaces so that the tensors
begin at a multiple of 64 bytes: mapped, they lie as the CPU's kernels like them.

Source of the format: https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from phi3v.errors import naming
from phi3v.files import write_json
from phi3v.model.weights import INDEX, SINGLE
from phi3v.progress import progress
from phi3v.training.checkpoints.reading import CheckpointWeights

SHARD_BYTES = 5_000_000_000  # of one file, as transformers has it
DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}
ALIGNMENT = 64  # bytes


def write_weights(
    weights: CheckpointWeights,
    names: Sequence[str],
    dtype: torch.dtype,
    out: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write these weights into files of at most `shard_bytes`, with an index if it takes several.

    A tensor that is larger has a file of its own.
    """
    sizes = {name: weights.weights[name].shape.numel() * dtype.itemsize for name in names}
    shards = plan_shards(sizes, shard_bytes)
    files = file_names(len(shards))
    with progress(None, "write", "B", sum(sizes.values()), unit_scale=True, leave=False) as bar:
        for file, shard in zip(files, shards, strict=True):
            with naming(out / file), (out / file).open("wb") as handle:
                handle.write(_header({n: (weights.shapes()[n], sizes[n]) for n in shard}, dtype))
                for name in shard:
                    with naming(weights.folder):
                        tensor = weights.read(name).to(dtype)
                    handle.write(tensor.flatten().view(torch.uint8).numpy().data)
                    bar.update(sizes[name])
    if len(files) > 1:
        places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = {"total_size": sum(sizes.values())}
        write_json(out / INDEX, {"metadata": total, "weight_map": places})


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Cut names, in their order, into shards of at most `limit` bytes, or of one larger tensor.

    {"a": 3, "b": 2, "c": 9, "d": 1} within 5 -> [["a", "b"], ["c"], ["d"]]
    """
    shards: list[list[str]] = []
    filled = limit
    for name, size in sizes.items():
        if filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def file_names(count: int) -> list[str]:
    """The published names of so many files."""
    if count == 1:
        return [SINGLE]
    return [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def _header(tensors: Mapping[str, tuple[tuple[int, ...], int]], dtype: torch.dtype) -> bytes:
    """The header for tensors of these shapes and sizes in bytes, with its length before it."""
    entries = dict(_entries(tensors, DTYPES[dtype]))
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _entries(
    tensors: Mapping[str, tuple[tuple[int, ...], int]], dtype: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    start = 0
    for name, (shape, size) in tensors.items():
        place = [start, start + size]
        yield name, {"dtype": dtype, "shape": shape, "data_offsets": place}
        start += size
