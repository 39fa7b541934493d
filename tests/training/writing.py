"""Run on one rank: a ZeRO-3 engine saved by DeepSpeed's own writer and by ours, in training.

writing.py FOLDER   writes FOLDER/theirs/step, FOLDER/ours/step of the same moment, and prints what
                    must be so
"""

import sys
from pathlib import Path
from typing import Any

from phi3v.training.ranks import run_command, set_environment

JSON = {
    "train_batch_size": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def main(folder: Path) -> None:
    set_environment()
    from phi3v.training import zero
    from phi3v.training.checkpoints.writer import Writer

    zero.start_process_group()
    engine = build_engine()
    train(engine)
    own = engine.checkpoint_engine
    writer = Writer()
    engine.save_checkpoint(str(folder / "theirs"), tag="step", save_latest=False)
    engine.checkpoint_engine = writer
    writer.guard(engine.optimizer.optimizer)
    writer.prepare(engine.optimizer.state_dict())
    writer.begin(folder / "ours" / "step")
    engine.save_checkpoint(str(folder / "ours"), tag="step", save_latest=False)
    train(engine)  # at once, on what is being copied
    writer.end(lambda files: print(*sorted(files)))
    writer.finish()
    steps = []
    for name, plug in (("theirs", own), ("ours", writer)):
        engine.checkpoint_engine = plug
        loaded, _ = engine.load_checkpoint(str(folder / name), tag="step")
        assert loaded is not None
        steps.append(train(engine))
    assert steps[0] == steps[1], steps
    zero.leave_together()


def build_engine() -> Any:
    import deepspeed
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 256))
    return deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=JSON, dist_init_required=False
    )[0]


def train(engine: Any) -> list[float]:
    """Losses of three steps."""
    import torch

    losses = []
    for _ in range(3):
        loss = engine(torch.ones(4, 256)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


if __name__ == "__main__":
    run_command(lambda: main(Path(sys.argv[1])))
