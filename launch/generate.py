"""Ask a model one question.

    python launch/generate.py MODEL --prompt TEXT [--image FILE ...]

Images are shown before the prompt unless it places them itself with <|image_1|>, <|image_2|>, ...
"""

import argparse
from pathlib import Path

from phi3v.evaluation.ask import ask
from phi3v.training.ranks import run_command, set_environment


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--image", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    arguments = parser.parse_args()
    set_environment()
    print(ask(arguments.model, arguments.prompt, arguments.image, arguments.max_new_tokens))


if __name__ == "__main__":
    run_command(main)
