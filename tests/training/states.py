"""Run on one rank: what an engine of each shipped JSON holds, beside phi3v/training/memory.py.

states.py FOLDER    for every JSON of FOLDER a tiny model and one step; writes FOLDER/found
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from phi3v.training.ranks import run_command, set_environment
from tests.distributed.steps import LR, as_dtype, packs, recipe

BUCKET = "reduce_bucket_size"


def main(folder: Path) -> None:
    set_environment()
    from phi3v.training import zero

    zero.start_process_group(600.0)
    found = {path.stem: look(path) for path in sorted(folder.glob("*.json"))}
    (folder / "found").write_text(json.dumps(found))
    zero.leave_together()


def look(path: Path) -> dict[str, Any]:
    """Bytes by what they are for: counted in the engine, and by the formulas."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from phi3v.config import load_deepspeed
    from phi3v.training import memory, zero
    from phi3v.training.optimizer import freeze, parameter_groups
    from tests.model.tiny import make_model

    class Watch(TorchDispatchMode):
        """What a backward pass makes anew: buckets, and the largest that one is joined into."""

        buckets, joined = 0, 0

        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = op(*args, **(kwargs or {}))
            if op is aten.empty.memory_format and result.numel() == memory.zero_value(ds, BUCKET):
                self.buckets += size(result)
            if op in (aten.cat.default, aten._to_copy.default) and result.dtype == torch.float32:
                self.joined = max(self.joined, size(result))
            return result

    def size(*tensors: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    aten = torch.ops.aten
    ds, cfg = load_deepspeed(path, 1), recipe(LR, ["projector"])
    cfg = replace(cfg, optim=replace(cfg.optim, vision_layer_decay=1.0))
    model = make_model().to(torch.bfloat16 if ds.bf16 else torch.float32).train()
    sizes = memory.Sizes.of(model.config)
    freeze(model, cfg.model.freeze)
    engine = zero.build_engine(model, parameter_groups(model, cfg), ds)
    optimizer = engine.optimizer
    loss = engine(**as_dtype(packs(1, 1)[0], torch.bfloat16 if ds.bf16 else torch.float32))
    with Watch() as watch:
        engine.backward(loss)
    found: dict[str, Any] = {"buckets": watch.buckets, "joined": watch.joined}
    bucket, joins = memory.bucket_bytes(sizes, ds, cfg.model.freeze)
    trained = sizes.trained(cfg.model.freeze)
    expected: dict[str, Any] = {"buckets": bucket, "joined": joins}
    if ds.zero_stage == 1:
        low = [p.grad for p in engine.module.parameters() if p.grad is not None]
        found["gradients"] = size(*low, *optimizer.fp32_groups_gradients_flat)
        expected["gradients"] = 6 * trained
    if ds.zero_stage == 3:
        found["buckets"] += size(*(bucket.buffer for bucket in optimizer.ipg_buckets.values()))
        masters = optimizer.fp32_partitioned_groups_flat
        second = [master.grad for master in masters if master.grad is not None]
        found["gradients"] = size(optimizer.grad_partitions_flat_buffer, *second)
        engine.step()
        state = [value for each in optimizer.optimizer.state.values() for value in each.values()]
        moments = [value for value in state if value.dim()]
        found |= {"optimizer": size(*masters, *moments), "shares": [m.numel() for m in masters]}
        host = memory.host_memory(sizes, ds, memory.Pack(tokens=1, views=0), cfg.model.freeze)
        expected["gradients"] = host.gradients or 4 * trained
        expected["optimizer"] = host.states or 12 * trained
        expected["shares"] = memory.optimizer_shares(sizes, ds, cfg.model.freeze)
    return {"found": found, "expected": expected}


if __name__ == "__main__":
    run_command(lambda: main(Path(sys.argv[1])))
