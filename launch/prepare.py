"""Turn rows and images into shards.

python launch/prepare.py RECIPE.yaml [key=value ...] [--part i/n | --merge | --verify]
"""

import argparse
from pathlib import Path

from phi3v.config import DatasetConfig, load_recipe
from phi3v.data.format import MANIFEST
from phi3v.prepare import Part, merge, prepare, prepare_part, summary, verify
from phi3v.printing import print
from phi3v.training.ranks import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    keys = "recipe keys to override"
    parser.add_argument("values", nargs="*", default=[], metavar="key=value", help=keys)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--part", metavar="i/n", help="part i of n of the scan, then of the write")
    kind.add_argument("--merge", action="store_true", help="join the parts of a pass")
    kind.add_argument("--verify", action="store_true", help="check every digest of the dataset")
    arguments = parser.parse_intermixed_args()
    cfg = load_recipe(DatasetConfig, arguments.recipe, arguments.values)
    out = Path(cfg.out)
    if arguments.verify:
        verify(out)
        print(f"{out}: every file is what the manifest says")
        return
    if arguments.part is not None:
        prepare_part(cfg, Part.parse(arguments.part))
        return
    is_there = (out / MANIFEST).is_file()
    manifest = merge(cfg) if arguments.merge else prepare(cfg)
    if is_there:
        print(f"{out} is up to date")
    if manifest is not None:
        print("\n".join(summary(out, manifest)))


if __name__ == "__main__":
    run_command(main)
