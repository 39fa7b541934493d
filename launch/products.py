"""Write the sample product catalogue: python launch/products.py OUT [--rows N] [--seed S]."""

import argparse
from pathlib import Path

from phi3v.samples.products import make_products
from phi3v.training.ranks import run_command


def main() -> None:
    """Parse the command line and write the catalogue."""
    parser = argparse.ArgumentParser(
        description="Write OUT/products.csv and OUT/images/*.jpg: drawn products, each picture "
        "alone telling title, category and price."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the catalogue's folder")
    parser.add_argument("--rows", type=int, default=3000, help="products (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another catalogue")
    args = parser.parse_args()
    make_products(args.out, rows=args.rows, seed=args.seed)


if __name__ == "__main__":
    run_command(main)
