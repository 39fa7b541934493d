"""Preparing with one worker process and with two: how near to twice as fast.

    python benchmarks/workers.py

Both prepare the same rows of photos from a recipe to the published folder; the time that processes
take to start is in it. With 16 crops two workers write 600 MB/s, more than many a disk takes:
TMPDIR chooses another.
"""

import argparse
import os
import tempfile
from itertools import count
from pathlib import Path

import numpy as np
from prepare import make_model, make_photos, recipe, write_rows
from timing import describe_machine, measure

from phi3v.prepare import prepare

SIZE, PHOTOS = (1344, 1008), 24


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--num_crops", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(describe_machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = make_photos(folder, *SIZE, PHOTOS)
        rows = write_rows(folder / "rows.jsonl", (files * arguments.rows)[: arguments.rows])
        model, number = make_model(folder / "model"), count()

        def run(workers: int) -> None:
            out = folder / f"out{next(number)}"
            prepare(recipe(rows, model, out, arguments.num_crops, workers=workers))
            for path in out.iterdir():
                path.unlink()

        times = measure({k: lambda k=k: run(k) for k in (1, 2)}, arguments.repeats)
    pictures = f"{SIZE[0]}x{SIZE[1]}, {arguments.num_crops} crops"
    print(f"{arguments.rows} rows of {pictures}; one call each before")
    for workers, side in times.items():
        seconds = np.median(side.wall)
        spread = ", ".join(f"{value:.1f}" for value in np.sort(side.wall))
        print(f"  {workers} workers  {arguments.rows / seconds:6.1f} rows/s  ({spread} s)")
    ratio = np.median(times[1].wall) / np.median(times[2].wall)
    print(f"  ratio      {ratio:.2f}x, {ratio / 2:.2f} of linear; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
