"""Look at the checkpoints of a run.

    python launch/checkpoints.py list RUN [--step N]     a line each: when, size, whole by sizes
    python launch/checkpoints.py inspect RUN [--step N]  all facts and files of the newest
    python launch/checkpoints.py verify RUN [--step N]   read every byte; exit code 2 if damaged

With --step: of that one alone.
"""

import argparse
from pathlib import Path

from phi3v.printing import print
from phi3v.training.checkpoints.listing import (
    inspect_checkpoint,
    list_checkpoints,
    verify_checkpoints,
)
from phi3v.training.ranks import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("action", choices=("list", "inspect", "verify"))
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--step", type=int, metavar="N")
    arguments = parser.parse_args()
    if arguments.action == "verify":
        verify_checkpoints(arguments.run, arguments.step)
        return
    lines = list_checkpoints if arguments.action == "list" else inspect_checkpoint
    for line in lines(arguments.run, arguments.step):
        print(line)


if __name__ == "__main__":
    run_command(main)
