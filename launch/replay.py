"""Show which samples a run had at a step, take the step again, find what made its loss jump.

    python launch/replay.py RUN --step N                    its samples, pack by pack
    python launch/replay.py RUN --step N --page FILE.html   the same with their pictures
    python launch/replay.py RUN --step N --check            from the checkpoint before it on, each
                                                            loss and gradient norm once more
    python launch/replay.py RUN --step N --bisect           each sample alone, those that carry the
                                                            loss first

RUN may be training: its folder is read only. --check and --bisect work on many ranks as well
(deepspeed launch/replay.py ...), and end with exit code 1 if the run wrote down other numbers.
"""

from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from pathlib import Path

from phi3v.training.ranks import run_command, set_environment
from phi3v.training.watchdog import end_with_launcher


def main() -> None:
    arguments = parse()
    end_with_launcher()
    ranks = set_environment()
    # DeepSpeed reads its environment when it is imported.
    from phi3v.replay.steps import open_step
    from phi3v.replay.wishes import Wishes, fulfil

    wishes = Wishes(page=arguments.page, check=arguments.check, bisect=arguments.bisect)
    is_again = arguments.check or arguments.bisect
    world_size = ranks.world_size if is_again else None
    step = open_step(arguments.run, arguments.step, arguments.values, world_size)
    fulfil(step, wishes, ranks)


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder")
    places = "data.shards=DIR, model.path=DIR: where they lie now"
    add("values", nargs="*", metavar="key=value", help=places)
    add("--step", type=int, required=True, metavar="N", help="from 1, as in metrics.jsonl")
    add("--page", type=Path, metavar="FILE.html", help="write a page instead of the list")
    add("--check", action="store_true", help="take the steps since the checkpoint again")
    add("--bisect", action="store_true", help="measure every sample of the step alone")
    add("--local_rank", help="set by the deepspeed launcher")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run_command(main)
