"""Turn rows and images into shards.

python launch/prepare.py RECIPE.yaml [key=value ...] [--verify]
"""

import argparse
from pathlib import Path

from phi3v.config import DatasetConfig, load_recipe
from phi3v.data.format import MANIFEST, REJECTED
from phi3v.prepare import prepare, verify
from phi3v.training.ranks import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("values", nargs="*", metavar="key=value", help="recipe keys to override")
    parser.add_argument("--verify", action="store_true", help="check every digest of the dataset")
    arguments = parser.parse_intermixed_args()
    cfg = load_recipe(DatasetConfig, arguments.recipe, arguments.values)
    out = Path(cfg.out)
    if arguments.verify:
        verify(out)
        print(f"{out}: every file is what the manifest says")
        return
    is_there = (out / MANIFEST).is_file()
    manifest = prepare(cfg)
    if is_there:
        print(f"{out} is up to date")
    for name, split in manifest["splits"].items():
        print(f"{out} {name}: {split['samples']:,} samples, {split['tokens']:,} tokens")
    rejected = manifest["rejected"]
    if rejected["count"]:
        print(f"{rejected['count']:,} of {manifest['rows']:,} rows rejected, see {out / REJECTED}:")
        for reason, count in rejected["by_reason"].items():
            print(f"  {count:,} x {reason}")


if __name__ == "__main__":
    run_command(main)
