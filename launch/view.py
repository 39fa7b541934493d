"""Write one HTML page that shows a dataset as the model will see it.

    python launch/view.py SHARDS --out FILE.html [--rows N | --ids ID ...]

Shows canvases with their crops, tokens by what is trained, lengths, the label audit, rejected rows
and packs.
"""

import argparse
from pathlib import Path

import torch

from phi3v.printing import print
from phi3v.training.ranks import run_command
from phi3v.view import Wishes, write_view


def main() -> None:
    arguments = parse()
    # Small pictures: threads would wait for each other, 6x as long on busy cores.
    torch.set_num_threads(1)
    wishes = Wishes(
        rows=arguments.rows,
        ids=tuple(arguments.ids),
        model=arguments.model,
        max_tokens=arguments.max_tokens,
        max_views=arguments.max_views,
    )
    write_view(arguments.shards, arguments.out, wishes)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e3:,.0f} kB")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="dataset folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.html")
    parser.add_argument("--rows", type=int, default=12, metavar="N", help="samples shown")
    parser.add_argument("--ids", nargs="+", default=[], metavar="ID", help="show these samples")
    parser.add_argument("--model", help="where the tokenizer is; default: the recipe's model")
    parser.add_argument("--max_tokens", type=int, help="of a pack; default 8192, or the longest")
    parser.add_argument("--max_views", type=int, help="of a pack; default 64, or the most")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
