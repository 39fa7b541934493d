"""The main job end to end, on data it makes itself: shards, training, evaluation, export, answer.

    python launch/demo.py [key=value ...]

Overrides go to the run recipe (launch/recipes/demo.yaml). Starts afresh each time.
"""

import argparse
from pathlib import Path

from phi3v.samples.demo import DemoFolders, run_demo
from phi3v.training.ranks import run_command

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    keys = "keys of the run recipe to override"
    parser.add_argument("values", nargs="*", default=[], metavar="key=value", help=keys)
    arguments = parser.parse_args()
    folders = DemoFolders(
        recipes=ROOT / "launch" / "recipes",
        data=Path("data/demo"),
        model=Path("models/demo"),
        shards=Path("shards/demo"),
        run=Path("runs/demo"),
    )
    run_demo(folders, ROOT / "launch", arguments.values)


if __name__ == "__main__":
    run_command(main)
