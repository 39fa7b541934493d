"""Run on ranks: take a step under every file of a folder, and report the norms of its gradient.

modules.py FOLDER OUT

Writes OUT, a JSON file, on the first rank. The first module of the model is frozen.
"""

import json
import sys
from pathlib import Path
from typing import Any

from phi3v.training.ranks import Ranks, run_command, set_environment

FROZEN = "vision"


def main(folder: Path, out: Path) -> None:
    ranks = set_environment()
    from phi3v.training import zero

    zero.start_process_group()
    found = {path.name: one_case(path, ranks) for path in sorted(folder.glob("*.json"))}
    if ranks.is_first:
        out.write_text(json.dumps(found))
    zero.leave_together()


def one_case(path: Path, ranks: Ranks) -> dict[str, Any]:
    """Norms as training reads them, and those of the whole gradients; then those of a bad step."""
    import torch
    from deepspeed.utils import safe_get_full_grad

    from phi3v.training import zero
    from phi3v.training.optimizer import module_of
    from tests.distributed.steps import as_dtype, build, packs, recipe

    dtype = torch.bfloat16 if "bf16" in path.name else torch.float32
    engine, ds = build(path, ranks, recipe(1e-3, [FROZEN]), dtype)
    batches = packs(ranks.world_size, ds.accumulation)[ranks.rank :: ranks.world_size]
    squares: dict[str, float] = {}
    for batch in batches:
        engine.backward(engine(**as_dtype(batch, dtype)))
        if engine.is_gradient_accumulation_boundary():
            for name, p in engine.module.named_parameters():
                if p.requires_grad:
                    square = float(safe_get_full_grad(p).double().square().sum())
                    squares[module_of(name)] = squares.get(module_of(name), 0.0) + square
        engine.step()
    total, norms = zero.gradient_norms(engine)
    for batch in batches:
        engine.backward(engine(**as_dtype(batch, dtype)) * float("nan"))
        engine.step()
    _, bad = zero.gradient_norms(engine)
    parts = engine.optimizer.kept_norms.maxlen / len(engine.optimizer.param_groups)
    engine.destroy()
    whole = {module: square**0.5 for module, square in squares.items()}
    return {"total": total, "norms": norms, "whole": whole, "bad": bad, "parts": parts}


if __name__ == "__main__":
    run_command(lambda: main(Path(sys.argv[1]), Path(sys.argv[2])))
