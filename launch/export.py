"""Export a checkpoint of a run as a Hugging Face folder.

python launch/export.py RUN --out DIR [--step N] [--dtype bf16|fp32]
"""

import argparse
from pathlib import Path

from phi3v.training.ranks import run_command, set_environment


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--step", type=int, help="default: the newest checkpoint")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: the base model's")
    arguments = parser.parse_args()
    set_environment()
    # DeepSpeed reads its environment when it is imported.
    from phi3v.export import export

    export(arguments.run, arguments.out, arguments.step, arguments.dtype)
    print(f"exported and verified: {arguments.out}")


if __name__ == "__main__":
    run_command(main)
