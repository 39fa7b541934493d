"""The sections of gpu.py in which all ranks work together: start, and every shipped JSON."""

import json
import math
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from fullsize import Bench
from gpu_table import Findings
from gpu_training import recipe_values

from phi3v.config import RunConfig, build_recipe, check, default_deepspeed, load_deepspeed
from phi3v.data.loader import Loader
from phi3v.data.packing import Position
from phi3v.files import write_json

STEPS = 2
ACCUMULATION = 2
# Losses of a step under other stages: sums in another order, and weights in bf16.
TOLERANCE = 2e-2
MEBIBYTES = 512  # reduced to measure the links


def start(bench: Bench, findings: Findings) -> None:
    """Every rank has a device of its own, and collectives give what they should on it."""
    from phi3v.training import zero

    bench.join()
    ranks, device = bench.ranks, bench.scale.device
    findings.check("ranks", ranks.world_size == bench.num_ranks, str(bench.num_ranks), str(ranks))
    places = zero.gather_objects((socket.gethostname(), *_device(device)))
    names = "; ".join(sorted({str(name) for _, _, name in places}))
    if device.type == "cuda":
        distinct = len({(host, uuid) for host, uuid, _ in places})
        seen = f"{distinct} on {names}"
        findings.check("devices of the ranks", distinct == len(places), f"{len(places)}", seen)
    else:
        findings.skipped("devices of the ranks", "needs CUDA")
    for name, collective in COLLECTIVES.items():
        found = zero.gather_objects(collective(ranks.rank, ranks.world_size, device))
        seen = f"{sum(found)} of {len(found)} ranks have it right"
        findings.check(name, all(found), "right on every rank", seen)
    if device.type == "cuda" and ranks.world_size > 1:
        findings.measured("all_reduce", _bandwidth(ranks.world_size, device))
    else:
        findings.skipped("rate of all_reduce", "needs 2 GPUs")


def _device(device: torch.device) -> tuple[str, str]:
    """What is this rank's device and nobody else's, and its name."""
    if device.type != "cuda":
        return "", "CPU"
    current = torch.cuda.get_device_properties(torch.cuda.current_device())
    return str(current.uuid), current.name


def _all_reduce(rank: int, ranks: int, device: torch.device) -> bool:
    value = torch.full((1000,), rank + 1.0, device=device)
    dist.all_reduce(value)
    return bool((value == ranks * (ranks + 1) / 2).all())


def _all_gather(rank: int, ranks: int, device: torch.device) -> bool:
    gathered = torch.empty(ranks * 8, device=device)
    dist.all_gather_into_tensor(gathered, torch.full((8,), float(rank), device=device))
    return gathered.tolist() == [float(r) for r in range(ranks) for _ in range(8)]


def _reduce_scatter(rank: int, ranks: int, device: torch.device) -> bool:
    share = torch.empty(8, device=device)
    dist.reduce_scatter_tensor(share, torch.arange(8.0 * ranks, device=device))
    return share.tolist() == [ranks * (8.0 * rank + i) for i in range(8)]


def _broadcast_object(rank: int, ranks: int, device: torch.device) -> bool:
    values = ["word" if rank == 0 else None]
    dist.broadcast_object_list(values)
    return values == ["word"]


COLLECTIVES: dict[str, Callable[[int, int, torch.device], bool]] = {
    "all_reduce": _all_reduce,
    "all_gather_into_tensor": _all_gather,
    "reduce_scatter_tensor": _reduce_scatter,
    "broadcast_object_list": _broadcast_object,
}


def _bandwidth(ranks: int, device: torch.device) -> str:
    value = torch.ones(MEBIBYTES << 19, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize()
        began = time.perf_counter()
        dist.all_reduce(value)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    sent = 2 * (ranks - 1) / ranks * value.nbytes / sorted(seconds)[2]
    return f"{sent / 1e9:.0f} GB/s to and from each rank, {MEBIBYTES} MiB at a time"


def jsons(bench: Bench, findings: Findings) -> None:
    """Every shipped JSON makes two steps on the shards, all of the same losses."""
    shipped = sorted(default_deepspeed(has_cuda=True).parent.glob("*.json"))
    expected: list[float] | None = None
    for path in shipped:
        if path.name == "zero3_cpu.json" and bench.scale.device.type == "cuda":
            continue
        if "hpz" in path.name and bench.ranks.world_size == 1:
            findings.skipped(path.name, "needs 2 GPUs")
            continue
        losses = _train(bench, _adapted(bench, path))
        expected = expected or losses
        apart = _apart(losses, expected)
        seen = f"{', '.join(f'{loss:.4f}' for loss in losses)}, {apart:.1e} from the first's"
        is_true = len(losses) == STEPS and apart <= TOLERANCE
        findings.check(path.name, is_true, f"{STEPS} losses within {TOLERANCE:.0e}", seen)


def _adapted(bench: Bench, path: Path) -> Path:
    """A shipped JSON with a small batch, and hpZ groups that these ranks can form."""
    content, ranks = json.loads(path.read_text(encoding="utf-8")), bench.ranks.world_size
    content["train_batch_size"] = ACCUMULATION * ranks
    zero = content["zero_optimization"]
    if "zero_hpz_partition_size" in zero:
        zero["zero_hpz_partition_size"] = math.gcd(zero["zero_hpz_partition_size"], ranks)
    if bench.scale.device.type == "cpu":  # DeepSpeed's own Adam would be compiled, for minutes
        content["optimizer"]["params"] |= {"torch_adam": True}
        content["optimizer"]["params"].pop("fused", None)
    adapted = bench.folder / f"{bench.ranks.rank}-{path.name}"
    write_json(adapted, content)
    return adapted


def _train(bench: Bench, path: Path) -> list[float]:
    """Losses of some steps as launch/train.py makes them, in this process's group."""
    from phi3v.training import zero
    from phi3v.training.loop import train_step
    from phi3v.training.opening import load_model, open_run
    from phi3v.training.optimizer import learning_rates, parameter_groups

    ranks = bench.ranks
    values = recipe_values(bench.folder, bench.folder / "runs/jsons", path, STEPS)
    cfg = build_recipe(RunConfig, values, bench.folder / "run.yaml", [])
    ds = load_deepspeed(path, ranks.world_size)
    check(cfg, ds)
    bench.join()
    run = open_run(cfg, ds, ranks)
    model = load_model(cfg, ds)
    model.set_execution(run.execution)
    engine = zero.build_engine(model, parameter_groups(model, cfg), ds)
    loader = Loader(run.dataset, run.plan, ranks.rank, ranks.world_size, run.device)
    coming, losses = loader.steps(Position()), []
    for number in range(1, STEPS + 1):
        rates = learning_rates(number, STEPS, cfg)
        losses.append(train_step(run, engine, loader, next(coming), rates).loss)
    coming.close()
    engine.destroy()
    return losses


def _apart(losses: list[float], expected: list[float]) -> float:
    pairs = zip(losses, expected, strict=False)
    return max((abs(a - b) / abs(b) for a, b in pairs), default=math.inf)
