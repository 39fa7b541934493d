"""Run on ranks: take optimizer steps with DeepSpeed on a tiny model and report what they did.

steps.py frozen JSON OUT       one step for each module frozen in turn, and for none
steps.py precision FOLDER OUT  steps in bfloat16 under every JSON of a folder, beside plain torch
steps.py losses FOLDER OUT     steps in float32 under every JSON of a folder

Writes OUT, a JSON file, on the first rank.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phi3v.training.ranks import Ranks, run_command, set_environment

LR = 1e-3
TINY_LR = 1e-5  # against weights of 0.2, whose neighbours in bfloat16 are 1e-3 away
TINY_STEPS = 40
FEW_STEPS = 5


def main(kind: str, path: Path, out: Path) -> None:
    ranks = set_environment()
    from phi3v.training import zero

    zero.start_process_group()
    task = {"frozen": frozen_cases, "precision": precision, "losses": losses}[kind]
    result = task(path, ranks)
    if ranks.is_first:
        out.write_text(json.dumps(result))
    zero.leave_together()


def recipe(lr: float, freeze: list[str]) -> Any:
    """A run recipe in which every group has a rate and a decay of its own."""
    from phi3v.config import RunConfig, build_recipe

    tree = {
        "run": {"out": "run"},
        "model": {"path": "tiny", "freeze": freeze},
        "data": {"shards": "shards"},
        "optim": {"lr": lr, "weight_decay": 0.1, "vision_layer_decay": 0.5},
        "train": {"max_steps": 1},
    }
    return build_recipe(RunConfig, tree, Path("steps.py"), [])


def packs(ranks: int, rounds: int) -> list[dict[str, Any]]:
    """A pack for each rank and round, with two images and a text each."""
    from phi3v.geometry import Grid
    from tests.model.tiny import draw, pack

    return [
        pack([draw(3 * n, 12, [Grid(1, 2)]), draw(3 * n + 1, 9), draw(3 * n + 2, 7, [Grid(1, 1)])])
        for n in range(ranks * rounds)
    ]


def build(path: Path, ranks: Ranks, cfg: Any, dtype: Any) -> tuple[Any, Any]:
    """The tiny model in a DeepSpeed engine, and the checked JSON."""
    from phi3v.config import load_deepspeed
    from phi3v.training import zero
    from phi3v.training.optimizer import freeze, learning_rates, parameter_groups
    from tests.model.tiny import make_model

    ds = load_deepspeed(path, ranks.world_size)
    model = make_model().to(dtype).train()
    freeze(model, cfg.model.freeze)
    engine = zero.build_engine(model, parameter_groups(model, cfg), ds)
    zero.set_learning_rates(engine, learning_rates(1, 1000, cfg))
    return engine, ds


def as_dtype(batch: dict[str, Any], dtype: Any) -> dict[str, Any]:
    return batch | {"views": batch["views"].to(dtype)}


def whole(engine: Any) -> dict[str, Any]:
    """All weights, gathered into a model of its own."""
    from phi3v.training import zero
    from tests.model.tiny import make_model

    target = make_model().to(engine.module.dtype)
    zero.copy_weights(engine.module, target)
    return {name: p.detach().clone() for name, p in target.named_parameters()}


def frozen_cases(path: Path, ranks: Ranks) -> dict[str, Any]:
    """Names of the weights that one step changed and left, by the module that was frozen."""
    import torch

    from phi3v.config import MODULES

    cases = {}
    for frozen in [[], *([module] for module in MODULES)]:
        engine, ds = build(path, ranks, recipe(LR, frozen), torch.float32)
        before = whole(engine)
        one_step(engine, packs(ranks.world_size, ds.accumulation)[ranks.rank :: ranks.world_size])
        after = whole(engine)
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        cases[" ".join(frozen)] = {
            "changed": changed,
            "left": [name for name in before if name not in changed],
            "rates": [(g["name"], g["lr_scale"], g["lr"]) for g in engine.optimizer.param_groups],
        }
        engine.destroy()
    return cases


def losses(folder: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """The losses of steps on the same packs, summed over ranks and rounds, by the JSON's name.

    Then a step whose gradient is not a number: its norm, and whether the weights stayed.
    """
    import torch

    from phi3v.training import zero

    found: dict[str, dict[str, Any]] = {}
    for path in configs(folder):
        engine, ds = build(path, ranks, recipe(LR, []), torch.float32)
        own = packs(ranks.world_size, ds.accumulation)[ranks.rank :: ranks.world_size]
        of_steps = [one_step(engine, own) for _ in range(FEW_STEPS)]
        before = whole(engine)
        one_step(engine, own, scale=float("nan"))
        norm, kept = zero.total_norm(engine), share(whole(engine), before) == 0
        found[path.name] = {"losses": of_steps, "norm": norm, "kept": kept}
        engine.destroy()
    return found


def configs(folder: Path) -> list[Path]:
    """The JSONs, those with a second partition last: DeepSpeed keeps it for the whole process."""
    return sorted(folder.glob("*.json"), key=lambda path: (b"hpz" in path.read_bytes(), path.name))


def one_step(engine: Any, batches: list[dict[str, Any]], scale: float = 1.0) -> float:
    """The loss of an optimizer step over all ranks; `scale` multiplies what is differentiated."""
    import torch

    from phi3v.training import zero

    total = torch.zeros(())
    for batch in batches:
        loss = engine(**batch)
        engine.backward(loss * scale)
        engine.step()
        total += loss.detach()
    return float(zero.sum_over_ranks(total))


def precision(folder: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """How far DeepSpeed's steps are from plain torch's, by the JSON's name."""
    steps_of: dict[str, Any] = {}  # plain torch's, by what they depend on
    return {path.name: one_precision(path, ranks, steps_of) for path in configs(folder)}


def one_precision(path: Path, ranks: Ranks, steps_of: dict[str, Any]) -> dict[str, Any]:
    """How far they are from those with float32 gradients and weights; {} but on the first rank."""
    import torch
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    cfg = recipe(TINY_LR, [])
    engine, ds = build(path, ranks, cfg, torch.bfloat16)
    batches = packs(ranks.world_size, ds.accumulation)
    own = batches[ranks.rank :: ranks.world_size]
    before = whole(engine)
    names = {id(p): name for name, p in engine.module.named_parameters()}
    grads: dict[str, torch.Tensor] = {}
    first: dict[str, torch.Tensor] = {}
    for number in range(TINY_STEPS):
        for batch in own:
            engine.backward(engine(**as_dtype(batch, torch.bfloat16)))
            if number == 0 and engine.is_gradient_accumulation_boundary():
                for p in trained(engine.module):
                    grads[names[id(p)]] = safe_get_full_grad(p).float()
            engine.step()
        if number == 0:
            first = whole(engine)
    masters = {names[id(p)]: safe_get_full_fp32_param(p) for p in trained(engine.module)}
    after = whole(engine)
    engine.destroy()
    if not ranks.is_first:
        return {}
    params = ds.json["optimizer"]["params"]
    key = json.dumps([params["betas"], params["eps"], ds.gradient_clipping, len(batches)])
    if key not in steps_of:
        steps_of[key] = plain(cfg, ds, batches)
    expected_grads, expected = steps_of[key]
    return {
        "gradient": far(grads, expected_grads),
        "movement": far(moved(masters, before), moved(expected, before)),
        "changed_first": share(first, before),
        "changed_last": share(after, before),
        "is_rounded": all(torch.equal(after[n], masters[n].bfloat16()) for n in masters),
    }


def trained(model: Any) -> Iterator[Any]:
    return (p for p in model.parameters() if p.requires_grad)


def moved(masters: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    return {name: master - before[name].float() for name, master in masters.items()}


def far(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The norm of the difference, as a share of the norm, over all tensors."""
    assert ours.keys() == theirs.keys()
    difference = sum(float((ours[n] - theirs[n]).square().sum()) for n in ours)
    return (difference / sum(float(theirs[n].square().sum()) for n in ours)) ** 0.5


def share(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The share of weights that differ."""
    differing = sum(int((one[n] != other[n]).sum()) for n in one)
    return differing / sum(p.numel() for p in one.values())


def plain(
    cfg: Any, ds: Any, batches: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same steps by torch alone: float32 weights, and a bfloat16 copy that computes.

    returns  the first step's gradients, and the weights after the last, in float32
    """
    import torch

    from phi3v.training.optimizer import parameter_groups
    from tests.model.tiny import make_model

    model = make_model().to(torch.bfloat16).train()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    masters = {name: torch.nn.Parameter(p.detach().float()) for name, p in named.items()}
    of = {id(p): masters[name] for name, p in named.items()}
    groups = parameter_groups(model, cfg)
    for group in groups:
        group["params"] = [of[id(p)] for p in group["params"]]
    params = ds.json["optimizer"]["params"]
    optimizer = torch.optim.AdamW(groups, betas=params["betas"], eps=params["eps"])
    first: dict[str, Any] = {}
    for number in range(TINY_STEPS):
        total = {name: torch.zeros_like(p) for name, p in masters.items()}
        for batch in batches:
            model.zero_grad()
            model(**as_dtype(batch, torch.bfloat16)).backward()
            for name, p in named.items():
                total[name] += p.grad.float() / len(batches)
        for name, master in masters.items():
            master.grad = total[name]
        if number == 0:
            first = {name: gradient.clone() for name, gradient in total.items()}
        if ds.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(list(masters.values()), ds.gradient_clipping)
        optimizer.step()
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(masters[name])
    return first, {name: p.detach() for name, p in masters.items()}


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
