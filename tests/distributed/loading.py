"""Run on ranks: load a model straight into ZeRO-3 partitions and report what it took.

loading.py FOLDER OUT    writes OUT/RANK.json: memory in bytes, and whether every value is right
"""

import json
import sys
import threading
from pathlib import Path

from phi3v.training.ranks import run_command, set_environment


def anonymous_bytes() -> int:
    """Memory of this process that is no file's: what counts against a host's limit."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


class Peak:
    """The highest anonymous memory while inside, above the level at entry."""

    def __enter__(self) -> "Peak":
        self.before = self.highest = anonymous_bytes()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.highest = max(self.highest, anonymous_bytes())

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._watcher.join()

    @property
    def bytes(self) -> int:
        return self.highest - self.before


def main(folder: Path, out: Path) -> None:
    ranks = set_environment()
    import deepspeed
    import torch

    from phi3v.config import load_deepspeed
    from phi3v.model import Phi3VConfig, Phi3VForCausalLM
    from phi3v.model.weights import WeightFiles
    from phi3v.training import zero

    ds = load_deepspeed(Path("ds_configs/zero3.json"), ranks.world_size)
    zero.start_process_group()
    torch.distributed.all_reduce(torch.ones(1))
    with torch.device("meta"):
        model = Phi3VForCausalLM(Phi3VConfig.from_pretrained(folder))
    with WeightFiles(folder) as files:
        with Peak() as peak:
            zero.load_partitioned(model, files, torch.bfloat16, ds)
        is_right = True
        for name, parameter in model.named_parameters():
            held = parameter.ds_tensor.numel() * ranks.world_size
            assert parameter.numel() == 0 and held >= parameter.ds_numel, name
            with deepspeed.zero.GatheredParameters([parameter]):
                is_right &= torch.equal(parameter, files.read(name))
    result = {"peak": peak.bytes, "is_right": is_right}
    (out / f"{ranks.rank}.json").write_text(json.dumps(result))
    zero.leave_together()


if __name__ == "__main__":
    run_command(lambda: main(Path(sys.argv[1]), Path(sys.argv[2])))
