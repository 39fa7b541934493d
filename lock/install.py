"""Install the versions that are tested together, each file compared with its hash, and the package.

    .venv/bin/python lock/install.py          what training needs
    .venv/bin/python lock/install.py test     and what the tests need
    .venv/bin/python lock/install.py tools    what `make lock` and `make audit` need besides

Nothing is left to pip but which build of torch, of the version in constraints.txt: PyPI's, which is
for CUDA, or another that an index or a folder of yours has (docs/install.md). The hashes are known
of PyPI's and of those for the CPU in cpu.txt; of others they are not, nor are those of their
libraries, and that is said.
"""

import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")


def main() -> None:
    lists = sys.argv[1:]
    install_locked("build")
    if lists == ["tools"]:
        install_locked("tools")
        return
    install_torch(offered_torch())
    for name in ("packages", *lists):
        install_locked(name)
    pip("install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", str(HERE.parent))
    pip("check")
    print(f"torch {installed('torch')}")


def install_locked(name: str) -> None:
    """Install what a list names and no more; DeepSpeed alone from source, which has no wheel."""
    built = ("--only-binary=:all:", "--no-binary=deepspeed", "--no-build-isolation")
    source = ("--requirement", str(HERE / f"{name}.txt"))
    pip("install", "--quiet", "--require-hashes", "--no-deps", *built, *source)


def offered_torch() -> str:
    """The version of torch that pip takes of all it sees: 2.13.0, or 2.13.0+cpu."""
    report = ("--dry-run", "--ignore-installed", "--no-deps", "--report=-")
    done = pip("install", "--quiet", *report, f"torch=={pinned('torch')}", stdout=subprocess.PIPE)
    return str(json.loads(done.stdout)["install"][0]["metadata"]["version"])


def install_torch(wanted: str) -> None:
    if "+" not in wanted:
        install_locked("torch")
        return
    if wanted.endswith("+cpu"):
        install_locked("cpu")  # whose lines are each for one Python and processor
    if installed("torch") != wanted:
        said = "is not in lock/: neither it nor its libraries are compared with hashes"
        print(f"torch {wanted} {said}", file=sys.stderr)
        constraints = ("--constraint", str(HERE.parent / "constraints.txt"))
        pip("install", "--quiet", *constraints, f"torch=={wanted}")


def pinned(name: str) -> str:
    """The version of a package in constraints.txt."""
    text = (HERE.parent / "constraints.txt").read_text(encoding="utf-8")
    found = re.search(rf"^{name}==(\S+)", text, flags=re.MULTILINE)
    assert found, name
    return found[1]


def installed(name: str) -> str | None:
    """The version of a package that this environment has."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def pip(*arguments: str, stdout: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run pip; where it fails, which it has explained, end with its exit code."""
    done = subprocess.run([*PIP, *arguments], stdout=stdout, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done


if __name__ == "__main__":
    main()
