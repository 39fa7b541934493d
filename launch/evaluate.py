"""Ask models the held-out rows of a dataset, seeing their pictures and blind.

    python launch/evaluate.py MODEL [MODEL ...] --shards DIR [--split S] [eval.KEY=value ...]
    python launch/evaluate.py MODEL [MODEL ...] --suite FILE.yaml

MODEL is a Hugging Face folder, or a run folder (its newest checkpoint, or --step N). Settings not
given are the first run's; without one, exact_match alone, no pattern. Several: a paired test.
A suite names datasets, each with its own settings.
"""

from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from pathlib import Path

from phi3v.printing import print
from phi3v.training.ranks import run_command, set_environment


def main() -> None:
    arguments = parse()
    set_environment()
    # DeepSpeed reads its environment when it is imported.
    from phi3v.evaluation.table import found_tables
    from phi3v.export.asking import ask_models

    asked = arguments.suite or arguments.shards
    step, out = arguments.step, arguments.out
    print(found_tables(ask_models(arguments.models, asked, arguments.overrides, step, out)))


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model or run folder")
    parser.add_argument("settings", nargs="*", default=[], metavar="eval.KEY=value")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--shards", metavar="DIR", help="made by launch/prepare.py")
    asked.add_argument("--suite", type=Path, metavar="FILE.yaml", help="several, with settings")
    parser.add_argument("--step", metavar="N", help="of the runs, or best; default: the newest")
    parser.add_argument("--split", metavar="S", help="default: the run's, or validation")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON of scores and answers")
    arguments = parser.parse_intermixed_args()
    arguments.overrides = [value for value in arguments.models if "=" in value]
    arguments.overrides += [f"eval.split={arguments.split}"] if arguments.split else []
    arguments.models = [value for value in arguments.models if "=" not in value]
    return arguments


if __name__ == "__main__":
    run_command(main)
