"""Collectives of a micro-step under ZeRO-3, ours against stock layers and settings, on two ranks.

    python benchmarks/collectives.py

The model has the published widths and two layers of each kind; a micro-step is one sample with an
image, forward and backward, its gradients reduced. Counted by torch's profiler, on the third: in
the first ZeRO-3 learns the order of modules, in the second it compares it. `stock` is
transformers' layers under DeepSpeed's defaults for stage 3; `ours` is our layers, each gathered as
a whole, under ds_configs/zero3.json. About 12 GB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import ROOT, describe_machine

from phi3v.training.ranks import run_command, set_environment

SIDES = ("stock", "ours")
RANKS = 2
TEXT = 64  # tokens beside the image


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--width", type=int, default=3072, help="of the decoder; the tower's is a third"
    )
    parser.add_argument("--side", choices=SIDES, help="of one rank; set by the benchmark itself")
    parser.add_argument("--out", type=Path, help="set by the benchmark itself")
    arguments = parser.parse_args()
    if arguments.side:
        count_side(arguments)
        return
    print(describe_machine())
    with tempfile.TemporaryDirectory() as name:
        counts = {side: launch(side, arguments.width, Path(name, side)) for side in SIDES}
    print(f"collectives of a micro-step, {RANKS} ranks, two layers of each kind")
    for kind in sorted({kind for side in counts.values() for kind in side}):
        print(f"  {kind:28} " + " ".join(f"{s} {counts[s].get(kind, 0):4}" for s in SIDES))
    totals = [sum(counts[side].values()) for side in SIDES]
    print(f"  {'all':28} stock {totals[0]:4} ours {totals[1]:4}: {totals[1] / totals[0]:.2f}")


def launch(side: str, width: int, out: Path) -> dict[str, int]:
    """Run one side on two ranks of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS)]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", __file__]
    command += ["--width", str(width), "--side", side, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    counts: dict[str, int] = json.loads(out.read_text())
    return counts


def count_side(arguments: argparse.Namespace) -> None:
    """On one rank: build the engine, and count what the third micro-step sends."""
    ranks = set_environment()
    import deepspeed

    from phi3v.training import zero

    zero.start_process_group()
    model = make_model(arguments.width)
    sample = make_inputs(model)
    if arguments.side == "ours":
        ds = load_settings(ranks.world_size)
        groups = [{"params": [p for p in model.parameters() if p.requires_grad], "name": "all"}]
        engine = zero.build_engine(model, groups, ds)
    else:
        from padded import PaddedRecipe

        stock = PaddedRecipe(model)
        stock.take_over()
        sample = pad_inputs(sample, model)
        engine, *_ = deepspeed.initialize(
            model=stock, config=stock_settings(), dist_init_required=False
        )
    for _ in range(2):
        engine.backward(engine(**sample))
        engine.step()
    counts = count_collectives(engine, sample)
    if ranks.is_first:
        arguments.out.write_text(json.dumps(counts))
    zero.leave_together()


def count_collectives(engine: Any, sample: dict[str, Any]) -> Counter[str]:
    """Collectives by name of one forward and backward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        engine.backward(engine(**sample))
    names = [event.name for event in profile.events() if event.name.startswith("c10d::")]
    return Counter(name.removeprefix("c10d::").strip("_") for name in names)


def make_model(width: int) -> Any:
    """The published widths, two decoder layers, two computed layers of the tower."""
    from phi3v.model import Phi3VConfig, Phi3VForCausalLM

    heads = width // 96
    factors = [1.0] * 48
    config = Phi3VConfig(
        vocab_size=32064,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        pad_token_id=0,
        rope_scaling={"type": "su", "short_factor": factors, "long_factor": factors},
        vision_config={
            "num_hidden_layers": 3,
            "hidden_size": width // 3,
            "intermediate_size": width * 4 // 3,
            "num_attention_heads": width // 192,
        },
    )
    with torch.device("meta"):
        model = Phi3VForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu").train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    return model


def make_inputs(model: Any) -> dict[str, Any]:
    """One sample of one image of one crop."""
    from phi3v.data.batch import collate, model_inputs
    from phi3v.geometry import Grid, image_tokens
    from phi3v.sample import IGNORED, Canvas, Sample
    from phi3v.views import ViewSettings

    side, size = model.config.image_side, model.config.vision_config.image_size
    pictures = image_tokens(Grid(1, 1), side)
    ids = np.concatenate([np.full(pictures, -1), np.arange(TEXT)]).astype(np.int32)
    labels = np.where(np.arange(len(ids)) < pictures, IGNORED, ids).astype(np.int32)
    canvas = Canvas(np.zeros((size, size, 3), np.uint8))
    settings = ViewSettings(size, (0.5,) * 3, (0.5,) * 3)
    return model_inputs(
        collate([Sample("one", ids, labels, (canvas,), {})]), settings, torch.device("cpu")
    )


def pad_inputs(sample: dict[str, Any], model: Any) -> dict[str, Any]:
    """The same sample as the padded recipe takes it."""
    return {
        "input_ids": sample["input_ids"],
        "labels": sample["labels"],
        "pixel_values": sample["views"][None],
        "grids": sample["grids"],
    }


def load_settings(world_size: int) -> Any:
    """ds_configs/zero3.json for so many ranks."""
    from phi3v.config import load_deepspeed

    content = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    optimizer = {"type": "AdamW", "params": {"torch_adam": True}}
    content |= {"train_batch_size": world_size, "optimizer": optimizer}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(content, file)
        file.flush()
        return load_deepspeed(Path(file.name), world_size)


def stock_settings() -> dict[str, Any]:
    """Stage 3 with DeepSpeed's own values for everything else."""
    return {
        "train_batch_size": int(os.environ["WORLD_SIZE"]),
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1000000000,
    }


if __name__ == "__main__":
    run_command(main)
