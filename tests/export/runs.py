"""Run folders for tests without training: a checkpoint of two ranks in DeepSpeed's ZeRO-3 form.

tests/test_export.py and tests/distributed/test_exported.py read what DeepSpeed itself writes.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from phi3v.config import RunConfig, build_recipe, dump_yaml
from phi3v.export import read_run
from phi3v.files import sha256, write_json
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.training.checkpoints.store import SavedFile, step_name, write_manifest

RANKS = 2
FROZEN = "model.vision_embed_tokens.img_processor.vision_model.post_layernorm."
SCORES = {
    "exact_match": {"value": 0.5, "low": 0.25, "high": 0.75, "n": 16},
    "blind_exact_match": {"value": 0.125, "low": 0.0, "high": 0.25, "n": 15},
    "constant_exact_match": {"value": 0.0625, "low": 0.0, "high": 0.2, "n": 16},
}


def make_run(folder: Path, base: Path, *steps: int) -> Path:
    """A run that started from `base`, with a checkpoint of each step; 3 without any."""
    tree = {
        "run": {"out": str(folder)},
        "model": {"path": str(base)},
        "data": {"shards": "/mnt/disk7/shards/animals"},
        "optim": {"lr": 1e-5},
        "train": {"max_steps": 3},
        "wandb": {"project": "/mnt/disk7/project"},
    }
    folder.mkdir(parents=True)
    cfg = build_recipe(RunConfig, tree, Path("runs.py"), [])
    (folder / "config.yaml").write_text(dump_yaml(cfg), encoding="utf-8")
    write_json(folder / "environment.json", {"device": "cpu x86_64", "commit": "c0ffee"})
    write_json(folder / "data.json", {"samples": 1234, "tokens": 56789})
    for step in steps or (3,):
        save(folder, drawn(base, step), step)
    return folder


def move_run(run: Path, base: Path, out: Path) -> Path:
    """A run, as if it had started from another copy of the base."""
    cfg = read_run(run)
    out.mkdir()
    (out / "checkpoints").symlink_to(run / "checkpoints")
    moved = replace(cfg, model=replace(cfg.model, path=str(base)))
    (out / "config.yaml").write_text(dump_yaml(moved), encoding="utf-8")
    return out


def drawn(base: Path, seed: int) -> dict[str, Tensor]:
    """Weights of a model folder's shapes, in float32, by its config.json alone."""
    with torch.device("meta"):
        model = Phi3VForCausalLM(Phi3VConfig.from_pretrained(base))
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=random) * 0.1 for name, p in model.named_parameters()
    }


def save(run: Path, weights: Mapping[str, Tensor], step: int) -> Path:
    """A checkpoint of these weights; the tower's last norm is frozen, and in bfloat16."""
    folder = run / "checkpoints" / step_name(step)
    folder.mkdir(parents=True)
    frozen = {name: w.bfloat16() for name, w in weights.items() if name.startswith(FROZEN)}
    trained = {name: w for name, w in weights.items() if name not in frozen}
    names = list(trained)
    groups = [names[: len(names) // 2], names[len(names) // 2 :]]
    for rank in range(RANKS):
        state = {
            "module": {},
            "param_shapes": [{name: trained[name].shape for name in group} for group in groups],
            "frozen_param_shapes": {name: w.shape for name, w in frozen.items()},
            "frozen_param_fragments": {name: share(w, rank) for name, w in frozen.items()},
        }
        torch.save(state, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        flat = [torch.cat([share(trained[name], rank) for name in group]) for group in groups]
        path = folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": {"fp32_flat_groups": flat}}, path)
    write_manifest(folder, facts(step), {p.name: digested(p) for p in folder.iterdir()})
    return folder


def share(weight: Tensor, rank: int) -> Tensor:
    """A rank's part of a weight; what is missing at the end is filled with a value that shows."""
    flat, length = weight.flatten(), -(-weight.numel() // RANKS)
    part = flat[rank * length : (rank + 1) * length]
    return torch.cat([part, part.new_full((length - len(part),), 777.0)])


def facts(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "world_size": RANKS,
        "zero_stage": 3,
        "fingerprints": {"config": "ab" * 32, "data": "cd" * 32},
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8", "flash-attn": None},
        "saved_at": "2026-11-21T12:00:00+00:00",
    }


def digested(path: Path) -> SavedFile:
    return SavedFile(path.stat().st_size, sha256(path))


def expected(base: Path, step: int) -> dict[str, Tensor]:
    """What the checkpoint of a step holds: the frozen ones were rounded."""
    weights = drawn(base, step)
    return {n: w.bfloat16().float() if n.startswith(FROZEN) else w for n, w in weights.items()}


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
