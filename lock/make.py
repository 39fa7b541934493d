"""Make the lock files of the versions in constraints.txt: `make lock`.

    build.txt     pip, and what builds DeepSpeed and this package
    torch.txt     torch, and what PyPI's needs on Linux: CUDA's libraries and Triton
    cpu.txt       torch for the CPU alone
    packages.txt  what else training needs
    test.txt      what the tests need besides
    tools.txt     uv, which resolves, and pip-audit

One resolution by uv is behind all, for every Python from OLDEST on and every kind of processor,
with the hashes of every file that PyPI has of a version. It has no torch for the CPU alone:
CPU_WHEELS are those that this project has had in hand.
"""

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
OLDEST = "3.10"
EXTRAS = ("cuda", "kernels", "test", "supply")
TORCH = re.compile(r"torch$|triton$|(?:nvidia|cuda)-")
BUILD = ("pip", "setuptools", "wheel")
CPU_WHEELS = {  # by Python and processor
    ("3.11", "x86_64"): "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
}
CPU_VERSION = "2.13.0"
HEAD = "# Made by `make lock` from setup.cfg and constraints.txt; edit those.\n"


def main() -> None:
    build = resolve(*BUILD)
    all_of_it = resolve("setup.cfg", *(f"--extra={extra}" for extra in EXTRAS))
    if not all_of_it["torch"].startswith(f"torch=={CPU_VERSION} "):
        sys.exit(f"CPU_WHEELS are of {CPU_VERSION}, and constraints.txt has another; change them")
    needed = resolve("setup.cfg", "--extra=cuda").keys()
    tested = resolve("setup.cfg", "--extra=test", "--extra=kernels").keys()
    torch = {name for name in needed if TORCH.match(name)}
    lists = {
        "torch": torch,
        "packages": needed - torch - build.keys(),
        "test": (tested - needed | tested & {"triton"}) - build.keys(),
        "tools": all_of_it.keys() - needed - tested - build.keys(),
    }
    write("build", build.values())
    write("cpu", [cpu_line(*kind, digest) for kind, digest in CPU_WHEELS.items()])
    for name, packages in lists.items():
        write(name, [all_of_it[package] for package in sorted(packages)])


def cpu_line(python: str, machine: str, digest: str) -> str:
    where = f"python_version == '{python}' and platform_machine == '{machine}'"
    return f"torch=={CPU_VERSION}+cpu ; {where} \\\n    --hash=sha256:{digest}\n"


def resolve(*arguments: str) -> dict[str, str]:
    """The lines of each package that uv chooses, by its name."""
    sources = [argument for argument in arguments if argument not in BUILD]
    command = [str(Path(sys.executable).with_name("uv")), "pip", "compile", "--universal"]
    command += ["--no-config", "--no-python-downloads", "--quiet", f"--python-version={OLDEST}"]
    command += [
        "--generate-hashes",
        "--no-header",
        "--no-annotate",
        "--constraints=constraints.txt",
    ]
    command += sources or ["-"]
    names = "\n".join(argument for argument in arguments if argument in BUILD)
    done = subprocess.run(command, cwd=HERE.parent, input=names, text=True, stdout=subprocess.PIPE)
    done.check_returncode()
    packages: dict[str, str] = {}
    for line in done.stdout.splitlines(keepends=True):
        if found := re.match(r"[a-z0-9-]+(?===)", line):
            name = found[0]
        packages[name] = packages.get(name, "") + line
    return packages


def write(name: str, packages: object) -> None:
    (HERE / f"{name}.txt").write_text(HEAD + "".join(packages), encoding="utf-8")


if __name__ == "__main__":
    main()
