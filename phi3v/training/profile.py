"""Record optimizer steps with torch's profiler, for chrome://tracing and https://ui.perfetto.dev.

with profiled(run_folder / "profile", number, cfg.debug.profile_steps, rank):
    train_step(...)
"""

import gzip
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from phi3v.devices import has_cuda
from phi3v.files import replacing, write_text

ROWS = 40  # of the table


@contextmanager
def profiled(folder: Path, step: int, steps: Collection[int], rank: int) -> Iterator[None]:
    """Record what happens inside if `step` is one of `steps`; otherwise do nothing.

    Writes folder/step-00000010-rank0.json.gz, a Chrome trace, on every rank, and on the first also
    step-00000010-rank0.txt: the operators that took longest by themselves. A recorded step is
    slower, and writing takes seconds more. If it fails, nothing is written.
    """
    if step not in steps:
        yield
        return
    devices = [ProfilerActivity.CUDA] if has_cuda() else []
    with profile(activities=[ProfilerActivity.CPU, *devices]) as recorded:
        yield
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}-rank{rank}.json.gz"
    with replacing(path) as temporary:
        recorded.export_chrome_trace(str(temporary))
        temporary.write_bytes(gzip.compress(temporary.read_bytes(), compresslevel=1))
    if rank == 0:
        order = f"self_{'device' if has_cuda() else 'cpu'}_time_total"
        table = recorded.key_averages().table(sort_by=order, row_limit=ROWS)
        write_text(folder / f"step-{step:08d}-rank{rank}.txt", table)
