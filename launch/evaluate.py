"""Ask models the held-out rows of a dataset, seeing their pictures and blind.

    python launch/evaluate.py MODEL [MODEL ...] --shards DIR [--split S] [eval.KEY=value ...]
    python launch/evaluate.py MODEL [MODEL ...] --suite FILE.yaml

MODEL is a Hugging Face folder, or a run folder (its newest checkpoint, or --step N). Settings not
given are the first run's; without one, exact_match alone, no pattern. Several: a paired test.
A suite names datasets, each with its own settings.
"""

from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING

from phi3v.training.ranks import run_command, set_environment

if TYPE_CHECKING:
    from phi3v.evaluation.suite import Part


def main() -> None:
    arguments = parse()
    set_environment()
    # DeepSpeed reads its environment when it is imported.
    from phi3v.evaluation.comparison import check_request
    from phi3v.evaluation.suite import ask_about, compare_all, open_parts, write_found
    from phi3v.evaluation.table import found_tables
    from phi3v.export import check_shards, check_step, open_any

    models, out = arguments.models, arguments.out
    check_request(models, out)
    parts = parts_of(arguments)
    for dataset in open_parts(parts):
        for model in models:
            check_shards(model, dataset)
    steps = check_step(models, arguments.step)
    given = {
        model: ask_about(model, open_any(model, parts[0].settings, steps[model]), parts)
        for model in models
    }
    found = compare_all(parts, given)
    print(found_tables(found))
    if out:
        write_found(out, found)


def parts_of(arguments: Namespace) -> "list[Part]":
    """The datasets of the suite, or the one that the command line names."""
    from phi3v.evaluation.evaluate import limit_owner
    from phi3v.evaluation.suite import Part, check_suite_alone, read_suite
    from phi3v.export import base_of, evaluation_settings

    if arguments.suite:
        check_suite_alone(arguments.overrides)
        return read_suite(arguments.suite)
    models, overrides = arguments.models, arguments.overrides
    runs = [model for model in models if base_of(model) != model]
    settings = evaluation_settings(Path([*runs, *models][0]), overrides)
    return [Part("", (arguments.shards,), settings, limit_owner(runs, overrides))]


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
