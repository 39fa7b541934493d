"""Run on ranks: compare the weights read from checkpoints with those of the engines that saved.

exported.py FOLDER    train a step under every JSON of the folder, and save; writes FOLDER/found
"""

import json
import sys
from pathlib import Path

from phi3v.training.ranks import Ranks, run_command, set_environment
from tests.distributed.steps import LR, as_dtype, build, one_step, packs, recipe, trained, whole

FROZEN, TAG = "vision", "step-00000001"


def main(folder: Path) -> None:
    ranks = set_environment()
    from phi3v.training import zero

    zero.start_process_group(60.0)
    found = {path.name: differing(path, ranks) for path in sorted(folder.glob("*.json"))}
    if ranks.is_first:
        (folder / "found").write_text(json.dumps(found))
    zero.leave_together()


def differing(path: Path, ranks: Ranks) -> dict[str, list[str]]:
    """Names of the weights that were read, of those that differ, and of those that have moved."""
    import torch
    from deepspeed.utils import safe_get_full_fp32_param

    from phi3v.training.checkpoints.reading import map_weights

    dtype = torch.bfloat16 if "bf16" in path.name else torch.float32
    engine, _ = build(path, ranks, recipe(LR, [FROZEN]), dtype)
    before = whole(engine)
    own = packs(ranks.world_size, 1)[ranks.rank :: ranks.world_size]
    one_step(engine, [as_dtype(batch, dtype) for batch in own])
    expected = {name: tensor.float() for name, tensor in whole(engine).items()}
    names = {id(p): name for name, p in engine.module.named_parameters()}
    for p in trained(engine.module):
        expected[names[id(p)]] = safe_get_full_fp32_param(p)
    engine.save_checkpoint(str(path.with_suffix("")), tag=TAG, save_latest=False)
    engine.destroy()
    torch.distributed.barrier()
    read = expected
    if ranks.is_first:
        read = {n: w.read() for n, w in map_weights(path.with_suffix("") / TAG).items()}
    assert read.keys() == expected.keys(), read.keys() ^ expected.keys()
    return {
        "read": [name for name, tensor in read.items() if tensor.dtype == torch.float32],
        "differ": [name for name, tensor in read.items() if not tensor.equal(expected[name])],
        "moved": [name for name in read if not before[name].float().equal(expected[name])],
    }


if __name__ == "__main__":
    run_command(lambda: main(Path(sys.argv[1])))
