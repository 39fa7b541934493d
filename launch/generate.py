"""Ask a model, once, in a conversation, or a file of questions.

    python launch/generate.py MODEL --prompt TEXT [--image FILE ...]
    python launch/generate.py MODEL --chat [--image FILE ...]
    python launch/generate.py MODEL --jsonl IN --out OUT

MODEL is a Hugging Face folder, a hub name, or a run folder (its newest checkpoint, or --step N).
Images are shown before the prompt unless it places them itself with <|image_1|>, <|image_2|>, ...
A line of IN is {"id", "prompt", "images": [PATH, ...]} or {"id", "messages", "images"}, of OUT
{"id", "prediction"}, or {"id", "error"} and exit code 2. Answers are greedy without a temperature.
"""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace, RawTextHelpFormatter
from functools import partial
from pathlib import Path

from phi3v.training.ranks import run_command, set_environment


def main() -> None:
    arguments = vars(parse())
    set_environment()
    # DeepSpeed reads its environment when it is imported.
    from phi3v.evaluation.wishes import Wishes, fulfil
    from phi3v.export import check_step, open_any, open_processor
    from phi3v.prepare.chats import read_messages
    from phi3v.prepare.fetch import local_images

    model, step = arguments.pop("model"), arguments.pop("step")
    with local_images(arguments.pop("images")) as images:
        wishes, steps = Wishes(**arguments, images=images), check_step([model], step)
        generator = partial(open_any, model, wishes.settings, steps[model])
        fulfil(wishes, generator, partial(open_processor, model), read_messages)


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="what answers: a folder, a run folder, or a hub name")
    add("--prompt", metavar="TEXT", help="one question")
    add("--chat", action="store_true", help="a conversation on stdin")
    add("--jsonl", type=Path, metavar="IN", help="a file of questions")
    add("--out", type=Path, metavar="OUT", help="file of the answers to --jsonl")
    add("--image_root", nargs="+", type=Path, default=[], help="of --jsonl, default: IN's folder")
    add("--step", metavar="N", help="of a run, or best; default: the newest checkpoint")
    images = "pictures, or their https addresses, of the question, the first of --chat"
    add("--image", nargs="+", default=[], metavar="FILE", dest="images", help=images)
    add("--system", metavar="TEXT", help="what the model is told first")
    as_it_comes = "show the answer as it comes; default: on a terminal"
    add("--stream", action=BooleanOptionalAction, help=as_it_comes)
    add("--max_new_tokens", type=int, default=256, help="of one answer, default %(default)s")
    add("--batch_rows", type=int, default=8, help="of --jsonl at once, default %(default)s")
    add("--temperature", type=float, help="draw tokens at random; 1: as the model has it")
    add("--top_p", type=float, help="from the likeliest of this probability, default 1")
    add("--seed", type=int, help="of the draws, default 0")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
