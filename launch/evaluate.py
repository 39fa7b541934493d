"""Ask models the held-out rows of a dataset, seeing their pictures and blind.

    python launch/evaluate.py MODEL [MODEL ...] --shards DIR [--split S] [eval.KEY=value ...]

MODEL is a Hugging Face folder, or a run folder for its newest checkpoint. Settings that are not
given are those of the first run folder. Several models answer the same rows, with a paired test.
"""

from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from pathlib import Path

from phi3v.training.ranks import run_command, set_environment


def main() -> None:
    arguments = parse()
    set_environment()
    # DeepSpeed reads its environment when it is imported.
    from phi3v.evaluation.comparison import compare_models, write_comparison
    from phi3v.evaluation.evaluate import evaluate
    from phi3v.evaluation.held_out import open_held_out
    from phi3v.evaluation.models import check_model
    from phi3v.evaluation.table import difference_table, score_table
    from phi3v.export import base_of, evaluation_settings, open_any
    from phi3v.training.checkpoints.store import find_step

    models, folders = arguments.models, [arguments.shards]
    runs = [model for model in models if base_of(model) != model]
    settings = evaluation_settings(Path([*runs, *models][0]), arguments.overrides)
    for dataset in open_held_out(folders, settings).datasets:
        for model in models:
            check_model(dataset, base_of(model))
    for run in runs:
        find_step(Path(run, "checkpoints"), None)
    found = {model: evaluate(open_any(model, settings), folders, settings) for model in models}
    pairs = compare_models(found, folders, settings)
    print("\n\n".join([score_table(found), *map(difference_table, pairs)]))
    if arguments.out:
        write_comparison(arguments.out, found, pairs, folders, settings)


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--shards", required=True, metavar="DIR")
    parser.add_argument("--split", help="default: the run's, or validation")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON of scores and answers")
    arguments = parser.parse_intermixed_args()
    arguments.overrides = [value for value in arguments.models if "=" in value]
    arguments.overrides += [f"eval.split={arguments.split}"] if arguments.split else []
    arguments.models = [value for value in arguments.models if "=" not in value]
    if not arguments.models or len(arguments.models) > len(set(arguments.models)):
        parser.error("name at least one model folder or run folder, and each once")
    if arguments.out and not arguments.out.parent.is_dir():
        parser.error(f"--out {arguments.out}: there is no folder {arguments.out.parent}; make it")
    return arguments


if __name__ == "__main__":
    run_command(main)
