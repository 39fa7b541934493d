"""Build what a DeepSpeed JSON makes DeepSpeed compile, once, before any run needs it.

    python launch/build.py FILE.json [FILE.json ...]

No shipped JSON needs this. One that asks for DeepSpeed's own FusedAdam or CPUAdam does: on a
machine with g++, and for a GPU's kernels nvcc, of the same kind as those that will train.
"""

import argparse
from pathlib import Path

from phi3v.printing import print
from phi3v.training.ranks import run_command, set_environment


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    set_environment()
    # DeepSpeed reads its environment when it is imported.
    from phi3v.config import load_deepspeed
    from phi3v.training.extensions import build_extensions

    for path in arguments.files:
        built = build_extensions(load_deepspeed(path, world_size=1))
        for file in built:
            print(f"{path}: {file}")
        if not built:
            print(f"{path}: nothing to build")


if __name__ == "__main__":
    run_command(main)
