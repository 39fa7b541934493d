"""Make the lock files of the versions in constraints.txt: `make lock`.

    build.txt     pip, and what builds DeepSpeed and this package
    torch.txt     torch, and what PyPI's needs on Linux: CUDA's libraries and Triton
    cpu.txt       torch for the CPU alone
    packages.txt  what else training needs
    test.txt      what the tests need besides
    tools.txt     uv, which resolves, and pip-audit

One resolution by uv is behind all, for every Python from OLDEST on and every kind of processor,
with the hashes of every file that PyPI has of a version. It has no torch for the CPU alone:
CPU_WHEELS are from PyTorch's own index, as lock files of two other projects agree on them; the
first was compared with the wheel that the tests run with.
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
    ("3.11", "aarch64"): "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7",
    ("3.12", "x86_64"): "4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2",
    ("3.12", "aarch64"): "6f307c2c32d764ffc6ff6893b801fad6d4752f3e67966cb8abf1843427c02604",
    ("3.13", "x86_64"): "3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6",
    ("3.13", "aarch64"): "0b8f7d0423027ae8b90c7977c627f3379f325363a08224dffad9b4b2d684a83d",
    ("3.14", "x86_64"): "d20fa53ee744502fa4c69818a720b05ca0d37abd055d4f6e66cae155114bc691",
    ("3.14", "aarch64"): "ca021f9eb2f8345c83fa03e3a04587308afb8df71bd472670b3ece00df58621c",
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
