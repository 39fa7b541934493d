"""Run on ranks: the loop's own parts on a recipe, or packs of given kinds in turn.

shares.py gradients RECIPE OUT   one step of the loop; OUT: loss, ids of its samples, gradients
shares.py kinds JSON OUT         packs with no, one and many images for either rank in turn, under
                                 all ways of recomputing, tower trained and frozen; OUT: losses

The first rank writes OUT by torch.save.
"""

import sys
from itertools import product
from pathlib import Path
from typing import Any

from phi3v.training.ranks import Ranks, run_command, set_environment

TIMEOUT = 60.0
KINDS = ("none", "one", "many")


def main(kind: str, path: str, out: Path) -> None:
    ranks = set_environment()
    import torch

    from phi3v.training import zero

    zero.start_process_group(TIMEOUT)
    result = {"gradients": gradients, "kinds": kinds}[kind](Path(path), ranks)
    if ranks.is_first:
        torch.save(result, out)
    zero.leave_together()


def gradients(path: Path, ranks: Ranks) -> dict[str, Any]:
    """The mean loss of the run's first step, its gradients and its samples."""
    from deepspeed.utils import safe_get_full_grad

    from phi3v.data.loader import Loader
    from phi3v.data.packing import Position
    from phi3v.training import zero
    from phi3v.training.loop import train_step
    from phi3v.training.opening import load_model, open_run
    from phi3v.training.optimizer import learning_rates, parameter_groups
    from phi3v.training.start import load_run

    cfg, ds = load_run(path, [], ranks)
    run = open_run(cfg, ds, ranks)
    model = load_model(cfg, ds)
    engine = zero.build_engine(model, parameter_groups(model, cfg), ds)
    loader = Loader(run.dataset, run.plan, ranks.rank, ranks.world_size)
    steps = loader.steps(Position())
    step = next(steps)
    found: dict[str, Any] = {}
    take_step = engine.step

    def look_and_step() -> None:
        if engine.is_gradient_accumulation_boundary():
            for name, parameter in engine.module.named_parameters():
                if parameter.requires_grad:
                    found[name] = safe_get_full_grad(parameter)
        take_step()

    engine.step = look_and_step
    result = train_step(run, engine, loader, step, learning_rates(1, 10, cfg))
    steps.close()
    samples = [[int(i) for i in pack] for pack in step.packs]
    return {"loss": result.loss, "norm": result.norm, "samples": samples, "gradients": found}


def kinds(path: Path, ranks: Ranks) -> list[list[float]]:
    """Losses of nine steps for each way, summed over the ranks; last with only layers trained."""
    ways = [
        of_way(path, ranks, how, frozen)
        for how, frozen in product(("none", "selective", "full"), ([], ["vision"]))
    ]
    return [*ways, of_way(path, ranks, "none", ["vision", "projector", "embeddings", "head"])]


def of_way(path: Path, ranks: Ranks, how: str, frozen: list[str]) -> list[float]:
    import torch

    from phi3v.config import RunConfig, build_recipe, load_deepspeed
    from phi3v.geometry import Grid
    from phi3v.model.execution import choose_execution
    from phi3v.training import zero
    from phi3v.training.optimizer import freeze, learning_rates, parameter_groups
    from tests.model.tiny import draw, make_model, pack

    grids = {"none": [], "one": [Grid(1, 2)], "many": [Grid(1, 1), Grid(2, 2), Grid(1, 3)]}
    tree = {
        "run": {"out": "run"},
        "model": {"path": "tiny", "freeze": frozen, "checkpointing": how},
        "data": {"shards": "shards"},
        "optim": {"lr": 1e-3},
        "train": {"max_steps": 10},
    }
    cfg = build_recipe(RunConfig, tree, Path("shares.py"), [])
    model = make_model().train()
    model.set_execution(choose_execution(cfg.model, torch.device("cpu")))
    freeze(model, cfg.model.freeze)
    engine = zero.build_engine(
        model, parameter_groups(model, cfg), load_deepspeed(path, ranks.world_size)
    )
    zero.set_learning_rates(engine, learning_rates(1, 10, cfg))
    losses = []
    for number, kinds_of_ranks in enumerate(product(KINDS, KINDS)):
        kind = kinds_of_ranks[ranks.rank]
        loss = engine(**pack([draw(number, 9), draw(number + 50, 12, grids[kind])]))
        engine.backward(loss)
        engine.step()
        losses.append(float(zero.sum_over_ranks(loss.detach())))
    engine.destroy()
    return losses


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
