"""A checkpoint for any number of ranks: DeepSpeed's universal form, made once, in this process.

DeepSpeed cuts the optimizer's state into one share per rank and refuses the shares of another
number of ranks. Its universal form holds every trained parameter whole, as
`zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt`, from which each rank takes its share.

    convert(checkpoint, target)    # the first rank, before the engine is built
    load(engine, target)           # all ranks

It is a folder like a checkpoint: written under another name, with a manifest of the size and digest
of every file, which also says of which checkpoint it is, so `store.find_damage` judges both.

Masters, moments, step counts and weights are then those that were saved, bit for bit. Frozen
parameters are not read from it: they stay what the engine's model was built with.

Surprising, of loading under ZeRO-3: DeepSpeed gives all parameter groups the settings of the first
(one learning rate, decay and name for every module), so `_without_shares` takes out what differs;
and all of the optimizer's states one step count, which torch's Adam then raises once for each, so
`load` gives every state its own. Left alone, each puts the losses of a tiny run off by 1 % within
three steps, and no error is seen.

What DeepSpeed reads on the way is data (`loading.data_only`), also in a folder of another person's.

A pool of processes would outlive a killed parent and write where the next start has cleaned up, so
the conversion uses none.

Source of the form: DeepSpeed 0.19.8 runtime/zero/stage3.py
`load_hp_checkpoint_state_from_checkpoint_dir_stage3`, checkpoint/ds_to_universal.py.
"""

import contextlib
import io
import re
import shutil
import sys
from argparse import Namespace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal

from phi3v.errors import CheckpointError
from phi3v.files import publish, sha256
from phi3v.printing import print
from phi3v.training.checkpoints.loading import data_only, load_data
from phi3v.training.checkpoints.store import (
    MADE_FROM,
    MANIFEST,
    SavedFile,
    read_manifest,
    remove_universal,
    write_manifest,
)

NAME = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)  # of a weight: a.b.0.weight


def convert(checkpoint: Path, target: Path) -> None:
    """Make `target` the universal form of a checkpoint; one that stands there goes first.

    For the first rank alone. While it is made it is `TARGET.partial`, which a kill leaves behind
    and the next call removes. Takes the memory of one rank's share, twice the checkpoint's bytes
    on the disk while it works, and once its bytes afterwards; what was written is read once more,
    for the digests.

    Raises: CheckpointError naming the checkpoint and what DeepSpeed stumbled over.
    """
    manifest = read_manifest(checkpoint)
    ranks = manifest.get("world_size")
    size = sum(file["bytes"] for file in manifest["files"].values()) / 1e9
    print(
        f"converting {checkpoint.name} from {ranks} ranks to any number: {size:.1f} GB, done once",
        file=sys.stderr,
        flush=True,
    )
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    remove_universal(target.parent, manifest["step"])
    facts = {
        "step": manifest["step"],
        "world_size": "any",
        "zero_stage": manifest.get("zero_stage"),
        MADE_FROM: sha256(checkpoint / MANIFEST),
        "saved_at": datetime.now(timezone.utc).isoformat(),
    }
    try:
        _convert(checkpoint, partial / target.name)
        write_manifest(partial / target.name, facts, _digests(partial / target.name))
        publish(partial / target.name, target)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint} of {ranks} ranks cannot be converted to another number: "
            f"{type(error).__name__}: {error}; start with {ranks} ranks, or mend the cause"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(engine: Any, target: Path) -> None:
    """Load a universal form into an engine just built; all ranks call.

    The learning rates of the parameter groups are then the engine's own, not those that were saved.
    """
    engine._config.load_universal_checkpoint = True
    with data_only(target):
        engine.load_checkpoint(str(target.parent), tag=target.name)
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):  # an integer in DeepSpeed's own optimizers
            state["step"] = state["step"].clone()


def _digests(folder: Path) -> dict[str, SavedFile]:
    """Size and digest of every file below a folder, by path relative to it."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): SavedFile.of(path) for path in files}


def _convert(checkpoint: Path, target: Path) -> None:
    """Call DeepSpeed's converter, which also writes `latest_universal` beside the target."""
    _check_names(checkpoint)
    target.mkdir(parents=True)
    arguments = Namespace(
        input_folder=str(checkpoint),
        output_folder=str(target),
        num_extract_workers=1,  # in this process
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    path = target / "zero" / "optimizer_state.pt"
    with data_only(checkpoint):
        with quiet[0], quiet[1]:
            ds_to_universal.main(arguments)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "optimizer_state_dict" in state:  # ZeRO-3
            torch.save(_without_shares(state), path)


def _check_names(checkpoint: Path) -> None:
    """Refuse a weight whose name would be a path out of the converted form, as folders have them.

    Raises: CheckpointError.
    """
    for path in sorted(checkpoint.glob("*.pt")):
        state = load_data(path, mmap=True)
        optimizer = state.get("optimizer_state_dict") or {}
        for kind in (state.get("param_shapes"), optimizer.get("param_slice_mappings")):
            for name in (name for group in kind or [] for name in group):
                if not NAME.fullmatch(name):
                    raise CheckpointError(
                        f"{path} names a weight {name!r}, which would be written outside of the "
                        "run folder; take a checkpoint from somebody you trust"
                    )


def _without_shares(state: dict[str, Any]) -> dict[str, Any]:
    """What all ranks and parameter groups have in common of the first rank's ZeRO-3 state.

    The first rank's share of masters and moments goes too: every rank would read it for nothing.
    """
    optimizer = state["optimizer_state_dict"]
    first, *others = optimizer["param_groups"]
    common = {
        key: value
        for key, value in first.items()
        if key == "params" or all(group[key] == value for group in others)
    }
    kept = {k: v for k, v in state.items() if k not in ("fp32_flat_groups", "param_groups")}
    steps = {0: {"step": optimizer["state"][0]["step"]}}
    return kept | {"optimizer_state_dict": {"state": steps, "param_groups": [common]}}
