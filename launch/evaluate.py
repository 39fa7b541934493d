"""Ask models the held-out rows of a dataset, seeing their pictures and blind.

    python launch/evaluate.py MODEL [MODEL ...] --shards DIR [--split S] [eval.KEY=value ...]

MODEL is a Hugging Face folder, or a run folder (its newest checkpoint, or --step N). Settings not
given are the first run's; without one, exact_match alone, no pattern. Several: a paired test.
"""

from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from pathlib import Path

from phi3v.training.ranks import run_command, set_environment


def main() -> None:
    arguments = parse()
    set_environment()
    # DeepSpeed reads its environment when it is imported.
    from phi3v.evaluation.comparison import check_request, compare_models, write_comparison
    from phi3v.evaluation.evaluate import evaluate, limit_owner
    from phi3v.evaluation.held_out import open_held_out
    from phi3v.evaluation.table import all_tables
    from phi3v.export import base_of, check_shards, check_step, evaluation_settings, open_any

    models, folders, out = arguments.models, [arguments.shards], arguments.out
    check_request(models, out)
    runs = [model for model in models if base_of(model) != model]
    settings = evaluation_settings(Path([*runs, *models][0]), arguments.overrides)
    for dataset in open_held_out(folders, settings).datasets:
        for model in models:
            check_shards(model, dataset)
    steps = check_step(models, arguments.step)
    found, place = {}, f" (time limit of {limit_owner(runs, arguments.overrides)})"
    for model in models:
        asked = open_any(model, settings, steps[model])
        found[model] = evaluate(asked, folders, settings, name=model + place)
    pairs = compare_models(found, folders, settings)
    print(all_tables(found, pairs))
    if out:
        write_comparison(out, found, pairs, folders, settings)


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model or run folder")
    parser.add_argument("settings", nargs="*", default=[], metavar="eval.KEY=value")
    parser.add_argument("--shards", required=True, metavar="DIR", help="made by launch/prepare.py")
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
