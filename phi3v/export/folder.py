"""A checkpoint to an ordinary Hugging Face folder, verified by reading it back.

    export(run, out)      # reads the newest checkpoint, writes beside `out`, verifies, renames

Memory stays within that of the largest shard: weights are read from the ranks' files and written
one at a time. Disk: the export, and what stood there until it is replaced.
"""

import ctypes
from pathlib import Path

import torch

from phi3v.export.card import write_card, write_text_card
from phi3v.export.opening import made_preprocessor, picture_settings, read_run
from phi3v.export.originals import write_originals, write_text_originals
from phi3v.export.target import ORIGIN, begin, check_target, finish, origin_of
from phi3v.export.verification import compare_logits, compare_tensors
from phi3v.export.weights import SHARD_BYTES, write_weights
from phi3v.files import write_json
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.model.weights import check_shapes
from phi3v.processing.processor import has_preprocessor
from phi3v.training.checkpoints.reading import CheckpointWeights, open_weights
from phi3v.training.run_folder import RunFolder

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
LARGE_BYTES = 1 << 20
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def export(
    run: Path,
    out: Path,
    step: int | None = None,
    dtype: str | None = None,
    is_text_only: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint of a run as a Hugging Face folder.

    step          of the checkpoint; None for the newest
    dtype         bf16 or fp32; None for the base model's
    is_text_only  the language model alone, as llama.cpp's converter reads it
    shard_bytes   of a file of weights at most
    Raises: ConfigError if `out` holds something that was not exported from this run;
    CheckpointError if there is no such checkpoint, it is damaged, or its names are not the model's.
    """
    _return_memory_at_once()
    base = read_run(run).model.path
    check_target(out, run)
    config = Phi3VConfig.from_pretrained(base)
    weights = open_weights(RunFolder(run).checkpoints, step)
    kind = DTYPES[dtype] if dtype else config.dtype or torch.float32
    names = [name for name in _names(weights, config) if not (is_text_only and "vision_" in name)]
    partial = begin(out)
    write_weights(weights, names, kind, partial, shard_bytes)
    if is_text_only:
        write_text_originals(base, partial, kind)
        write_text_card(run, weights.manifest, partial)
    else:
        settings = picture_settings(run)
        made = None if has_preprocessor(base) else made_preprocessor(run, settings)
        write_originals(base, partial, kind, settings, made)
        write_card(run, weights.manifest, partial)
    write_json(partial / ORIGIN, origin_of(run, weights.folder.name))
    compare_tensors(partial, weights, names, kind)
    if not is_text_only:
        compare_logits(partial, weights, config, kind)
    finish(out)


def _return_memory_at_once() -> None:
    """Have glibc give the memory of every freed tensor back to the system.

    Left alone it keeps some, more or less by chance: of the test's 241 MB of weights once 30 MB
    were held at the peak, once 138 MB.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


def _names(weights: CheckpointWeights, config: Phi3VConfig) -> list[str]:
    """The published names in the model's order, each checked to be there in the right shape."""
    with torch.device("meta"):
        model = Phi3VForCausalLM(config)
    check_shapes(weights.path, weights.shapes(), model)
    return [name for name, _ in model.named_parameters()]
