"""Train on prepared shards.

    deepspeed launch/train.py RECIPE.yaml [--deepspeed_config FILE.json] [key=value ...]

The same under torchrun, plain srun, or as `python launch/train.py` on one rank. Without a recipe
the sample products and a tiny model are made and trained on.
"""

import argparse
from pathlib import Path

from phi3v.training.ranks import run_command, set_environment
from phi3v.training.stopping import StopRequests
from phi3v.training.watchdog import end_with_launcher

RECIPES = Path(__file__).parent / "recipes"


def main() -> None:
    arguments = parse()
    stop = StopRequests()
    stop.listen()
    end_with_launcher()
    ranks = set_environment()
    # DeepSpeed reads its environment when it is imported.
    from phi3v.training.loop import train
    from phi3v.training.start import load_run

    cfg, ds = load_run(arguments.recipe or RECIPES / "demo.yaml", arguments.values, ranks)
    if arguments.recipe is None:
        from phi3v.samples.demo import make_missing  # a second that other runs need not wait

        make_missing(cfg, RECIPES / "products.yaml")
    train(cfg, ds, ranks, stop)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", help="run recipe; default: the demo's")
    parser.add_argument("values", nargs="*", metavar="key=value", help="recipe keys to override")
    parser.add_argument("--deepspeed_config", metavar="FILE.json", help="wins over the recipe's")
    parser.add_argument("--local_rank", help="set by the deepspeed launcher")
    arguments = parser.parse_intermixed_args()
    if arguments.recipe and "=" in arguments.recipe:  # overrides without a recipe
        arguments.values.insert(0, arguments.recipe)
        arguments.recipe = None
    if arguments.deepspeed_config:
        arguments.values.append(f"deepspeed={arguments.deepspeed_config}")
    return arguments


if __name__ == "__main__":
    run_command(main, prints_result=False)
