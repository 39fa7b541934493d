"""Make a tiny random Phi-3-Vision with a tokenizer trained on some texts.

    python launch/tiny_model.py OUT [--texts FILE ...] [--width 128] [--vision_layers 4] ...

Every size is a flag. Without --texts the tokenizer learns the sample products' words.
"""

import argparse
from dataclasses import fields
from pathlib import Path

from phi3v.errors import ConfigError
from phi3v.printing import print
from phi3v.samples.products import sample_texts
from phi3v.samples.tiny import TinySizes, make_tiny_model
from phi3v.training.ranks import run_command, set_environment


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--texts", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    for size in fields(TinySizes):
        parser.add_argument(f"--{size.name}", type=int, default=size.default)
    arguments = parser.parse_args()
    set_environment()
    sizes = TinySizes(**{size.name: getattr(arguments, size.name) for size in fields(TinySizes)})
    texts = read_lines(arguments.texts) if arguments.texts else sample_texts()
    make_tiny_model(arguments.out, texts, sizes, arguments.seed)
    print(f"tiny model: {arguments.out}")


def read_lines(paths: list[Path]) -> list[str]:
    lines: list[str] = []
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"--texts {path} does not exist; name text files")
        try:
            lines += path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"--texts {path} is no text in UTF-8 ({error}); name a CSV or JSONL"
            ) from error
    return lines


if __name__ == "__main__":
    run_command(main)
