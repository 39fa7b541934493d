"""Run on one rank: a ZeRO-3 engine saved by DeepSpeed's own writer and by ours, in training.

writing.py FOLDER [offload]    writes FOLDER/theirs/step, FOLDER/ours/step of the same moment, and
                               prints what must be so, and how many MB more a step with a save took;
                               `offload`: the optimizer in the host's memory
"""

import sys
from pathlib import Path
from typing import Any

from phi3v.training.ranks import run_command, set_environment

JSON: dict[str, Any] = {
    "train_batch_size": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


WIDTH = 2048  # of two matrices: 101 MB of masters and moments


def main(folder: Path, offload: str = "") -> None:
    set_environment()
    import torch

    from phi3v.training import zero
    from phi3v.training.checkpoints.writer import Writer

    zero.start_process_group()
    engine = build_engine(bool(offload))
    train(engine)
    before = start_peak()
    train(engine)
    alone = peak() - before
    own = engine.checkpoint_engine
    writer = Writer(torch.device("cpu"), bool(offload))
    engine.save_checkpoint(str(folder / "theirs"), tag="step", save_latest=False)
    before = start_peak()
    engine.checkpoint_engine = writer
    writer.guard(engine.optimizer.optimizer)
    writer.prepare(engine.optimizer.state_dict())
    writer.begin(folder / "ours" / "step")
    engine.save_checkpoint(str(folder / "ours"), tag="step", save_latest=False)
    writer.end(lambda files: print(*sorted(files)))
    train(engine)  # at once, on what is being copied or written
    writer.finish()
    print(f"took {(peak() - before - alone) / 1e6:.0f} MB more")
    steps = []
    for name, plug in (("theirs", own), ("ours", writer)):
        engine.checkpoint_engine = plug
        zero.load_checkpoint(engine, folder / name, "step")
        steps.append(train(engine))
    assert steps[0] == steps[1], steps
    zero.leave_together()


def start_peak() -> int:
    """Forget the process's peak; returns the bytes that it has now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def build_engine(offload: bool) -> Any:
    import deepspeed
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH))
    zero = JSON["zero_optimization"] | ({"offload_optimizer": {"device": "cpu"}} if offload else {})
    config = JSON | {"zero_optimization": zero}
    return deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config, dist_init_required=False
    )[0]


def train(engine: Any) -> list[float]:
    """Losses of three steps."""
    import torch

    losses = []
    for _ in range(3):
        loss = engine(torch.ones(4, WIDTH)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


if __name__ == "__main__":
    run_command(lambda: main(Path(sys.argv[1]), *sys.argv[2:]))
