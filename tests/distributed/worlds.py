"""Run on ranks, once on some ranks and then on others: is the state the same?

worlds.py FOLDER    for every JSON of FOLDER a tiny model: the first time, some steps and a
                    checkpoint; the second, that checkpoint on other ranks, saved again at once

Writes FOLDER/found the second time, a JSON file, on the first rank.
"""

import json
import sys
from pathlib import Path
from typing import Any

from phi3v.training.ranks import Ranks, run_command, set_environment
from tests.distributed.steps import LR, as_dtype, one_step, packs, recipe, whole

STEPS = 3
SAVED, AGAIN = "step-00000003", "step-00000004"


def main(folder: Path) -> None:
    ranks = set_environment()
    from phi3v.training import zero

    zero.start_process_group(60.0)
    found = {}
    for path in sorted(folder.glob("*.json")):
        first = folder / f"{path.stem}.pt"
        if first.exists():
            found[path.name] = take_up(path, first, ranks)
        else:
            begin(path, first, ranks)
    if found and ranks.is_first:
        (folder / "found").write_text(json.dumps(found))
    zero.leave_together()


def build(path: Path, ranks: Ranks) -> tuple[Any, Any]:
    """An engine with groups of different rates and decays, and something frozen."""
    import torch

    from phi3v.config import load_deepspeed
    from phi3v.training import zero
    from phi3v.training.optimizer import freeze, parameter_groups
    from tests.model.tiny import make_model

    ds, cfg = load_deepspeed(path, ranks.world_size), recipe(LR, ["projector"])
    model = make_model().to(torch.bfloat16 if ds.bf16 else torch.float32).train()
    freeze(model, cfg.model.freeze)
    return zero.build_engine(model, parameter_groups(model, cfg), ds), ds


def begin(path: Path, first: Path, ranks: Ranks) -> None:
    """Train, save, note the state and what follows from it."""
    import torch

    engine, ds = build(path, ranks)
    train(engine, ds, ranks)
    save(engine, path, SAVED, ranks)
    state = {"weights": whole(engine), "groups": settings(engine)}
    state["losses"] = train(engine, ds, ranks)
    if ranks.is_first:
        torch.save(state, first)
    engine.destroy()


def take_up(path: Path, first: Path, ranks: Ranks) -> dict[str, Any]:
    """Load what others saved, save it again, go on; returns both sides."""
    import torch

    from phi3v.training.checkpoints.convert import convert, load
    from phi3v.training.checkpoints.store import universal_name

    expected = torch.load(first, weights_only=False)
    folder = path.with_suffix("")
    targets = [folder / universal_name(step) for step in (3, 4)]
    if ranks.is_first:
        convert(folder / SAVED, targets[0])
    torch.distributed.barrier()
    engine, ds = build(path, ranks)
    load(engine, targets[0])
    save(engine, path, AGAIN, ranks)
    if ranks.is_first:
        convert(folder / AGAIN, targets[1])
    weights = whole(engine)
    found = compare(*targets) if ranks.is_first else {}
    found |= {"groups": settings(engine), "groups_saved": expected["groups"]}
    found["weights_differ"] = sum(not weights[n].equal(w) for n, w in expected["weights"].items())
    found |= {"losses": train(engine, ds, ranks), "losses_saved": expected["losses"]}
    engine.destroy()
    return found


def train(engine: Any, ds: Any, ranks: Ranks) -> list[float]:
    """The losses of some steps on the same packs, whatever ranks work on them."""
    from phi3v.training import zero
    from phi3v.training.optimizer import learning_rates

    own = packs(1, ds.train_batch_size)[ranks.rank :: ranks.world_size]
    own = [as_dtype(batch, engine.module.dtype) for batch in own]
    zero.set_learning_rates(engine, learning_rates(1, 1000, recipe(LR, ["projector"])))
    return [one_step(engine, own) for _ in range(STEPS)]


def save(engine: Any, path: Path, name: str, ranks: Ranks) -> None:
    import torch

    from phi3v.training.checkpoints.store import SavedFile, write_manifest

    folder = path.with_suffix("")
    engine.save_checkpoint(str(folder), tag=name, save_latest=False)
    if ranks.is_first:
        step = {SAVED: 3, AGAIN: 4}[name]
        facts = {
            "step": step,
            "world_size": ranks.world_size,
            "zero_stage": engine.zero_optimization_stage(),
        }
        files = {path.name: SavedFile.of(path) for path in (folder / name).iterdir()}
        write_manifest(folder / name, facts, files)
    torch.distributed.barrier()


def settings(engine: Any) -> list[dict[str, Any]]:
    """What the parameter groups are set to, but for the rate, which every step sets."""
    keys = ("name", "lr_scale", "weight_decay")
    return [{key: group[key] for key in keys} for group in engine.optimizer.param_groups]


def compare(one: Path, other: Path) -> dict[str, Any]:
    """The files of two universal forms that do not hold the same."""
    names = sorted(path.relative_to(one) for path in one.glob("zero/*/*.pt"))
    assert names == sorted(path.relative_to(other) for path in other.glob("zero/*/*.pt"))
    differing = [str(name) for name in names if not read(one / name).equal(read(other / name))]
    return {"num_compared": len(names), "differing": differing}


def read(path: Path) -> Any:
    import torch

    content = torch.load(path, weights_only=False)
    tensor = content["param"] if isinstance(content, dict) else content
    return torch.as_tensor(tensor).flatten()


if __name__ == "__main__":
    run_command(lambda: main(Path(sys.argv[1])))
