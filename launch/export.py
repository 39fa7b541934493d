"""Export a checkpoint of a run as a Hugging Face folder.

    python launch/export.py RUN --out DIR [--step N|best] [--dtype bf16|fp32]
                            [--push OWNER/NAME [--private]]     then upload it to the hub
    python launch/export.py RUN --out DIR --llama-cpp           the text half, for its converter

The folder is verified before it gets its name: every tensor, and the answer to a prompt.
"""

import argparse
from pathlib import Path

from phi3v.errors import ConfigError
from phi3v.printing import print
from phi3v.training.ranks import run_command, set_environment


def main() -> None:
    arguments = parse()
    set_environment()
    # DeepSpeed reads its environment when it is imported.
    from phi3v.export import export
    from phi3v.export.push import Repository
    from phi3v.training.checkpoints.store import named_step

    out, repository = arguments.out, None
    if arguments.push:
        repository = Repository(arguments.push, arguments.private)
        repository.check(arguments.run)
    step = named_step(arguments.run / "checkpoints", arguments.step)
    export(arguments.run, out, step, arguments.dtype, arguments.llama_cpp)
    print(f"exported and verified: {out}", flush=True)
    if repository:
        print(f"pushed: {repository.push(out)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--step", metavar="N", help="or best; default: the newest checkpoint")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: the base model's")
    parser.add_argument("--llama-cpp", action="store_true", help="the language model alone")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload to this repository")
    parser.add_argument("--private", action="store_true", help="if --push creates it")
    arguments = parser.parse_args()
    if arguments.private and not arguments.push:
        raise ConfigError("--private is for --push, which is not given; add it, or leave this out")
    return arguments


if __name__ == "__main__":
    run_command(main)
