"""Ask models the held-out rows of a dataset, seeing their pictures and blind.

    python launch/evaluate.py MODEL [MODEL ...] --shards DIR [--split S] [eval.KEY=value ...]

MODEL is a Hugging Face folder or a run folder (then its newest checkpoint is asked, and its own
eval settings hold where none are given). Several are printed side by side.
"""

import argparse
from pathlib import Path

from phi3v.training.ranks import run_command, set_environment


def main() -> None:
    arguments = parse()
    set_environment()
    # DeepSpeed reads its environment when it is imported.
    from phi3v.evaluation.evaluate import evaluate, open_held_out
    from phi3v.evaluation.models import check_model
    from phi3v.evaluation.table import score_table
    from phi3v.export import base_of, evaluation_settings, open_any

    overrides = [value for value in arguments.models if "=" in value]
    models = [value for value in arguments.models if "=" not in value]
    if arguments.split:
        overrides.append(f"eval.split={arguments.split}")
    settings = evaluation_settings(Path(models[0]), overrides)
    held_out = open_held_out([arguments.shards], settings)
    for model in models:
        for dataset in held_out.datasets:
            check_model(dataset, base_of(model))
    scores = {}
    for model in models:
        generator = open_any(model, settings)
        scores[model] = evaluate(generator, [arguments.shards], settings)
    print(score_table(scores))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--shards", required=True, metavar="DIR")
    parser.add_argument("--split", help="default: validation")
    arguments = parser.parse_intermixed_args()
    if all("=" in value for value in arguments.models):
        parser.error("name at least one model folder or run folder")
    return arguments


if __name__ == "__main__":
    run_command(main)
