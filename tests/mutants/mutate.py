"""Put known faults into a copy of the code, one at a time, and see the fast tests notice each.

    python -m tests.mutants.mutate [--jobs 2] [--only WORDS]

Prints a line for each mutant of mutants.yaml and a table at the end; exits with 1 if one survived,
broke what it should not (no test ran) or took too long. The tests must pass without any fault,
which is seen first.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import yaml

from tests.commands import ROOT, run

LIST = Path(__file__).with_name("mutants.yaml")
MAX_SECONDS = 300.0  # that the tests of one mutant may take
ENDS = {0: "survived", 1: "killed"}  # by pytest's exit code; others say that no test ran


@dataclass(frozen=True)
class Mutant:
    """A fault: `new` in the place of `old`, which the file holds once, and tests for it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, source: str) -> str:
        """The file's text with the fault in it.

        Raises: ValueError if `old` is not there exactly once.
        """
        if (count := source.count(self.old)) != 1:
            raise ValueError(f"{self.file} holds {self.old!r} {count} times: '{self.name}'")
        return source.replace(self.old, self.new)


def read_mutants(path: Path = LIST) -> list[Mutant]:
    """All mutants of the list, in its order."""
    return [
        Mutant(
            entry["name"],
            part["file"],
            entry["old"],
            entry["new"],
            tuple(entry.get("tests", part["tests"])),
        )
        for part in yaml.safe_load(path.read_text(encoding="utf-8"))
        for entry in part["mutants"]
    ]


def copy_code(folder: Path) -> Path:
    """Copy the files that git tracks, and new ones that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run_tests(folder: Path, tests: Sequence[str]) -> tuple[int | None, str]:
    """Exit code and output of the fast ones of some tests; None if they took too long."""
    options = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    variables = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = run(*command, cwd=folder, timeout=MAX_SECONDS, **variables)
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout + done.stderr


@contextmanager
def applied(mutant: Mutant, folder: Path) -> Iterator[None]:
    path = folder / mutant.file
    source = path.read_text(encoding="utf-8")
    path.write_text(mutant.apply(source), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(source, encoding="utf-8")


def try_mutant(mutant: Mutant, folders: "Queue[Path]") -> str:
    """How a mutant ended: killed, survived, no test ran, too slow."""
    folder, began = folders.get(), time.monotonic()
    try:
        with applied(mutant, folder):
            code, _ = run_tests(folder, mutant.tests)
    finally:
        folders.put(folder)
    end = "too slow" if code is None else ENDS.get(code, f"no test ran ({code})")
    seconds = time.monotonic() - began
    print(f"{end:9} {seconds:5.0f} s  {mutant.file}: {mutant.name}", flush=True)
    return end


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--only", default="", help="those with these words in file or name")
    args = parser.parse_args()
    mutants = [m for m in read_mutants() if args.only in f"{m.file}: {m.name}"]
    if not mutants:
        parser.error(f"no mutant has {args.only!r} in its file or name")
    with tempfile.TemporaryDirectory(prefix="mutants-") as parent:
        folders: Queue[Path] = Queue()
        for number in range(args.jobs):
            folders.put(copy_code(Path(parent, str(number))))
        whole = folders.get()
        code, output = run_tests(whole, sorted({test for m in mutants for test in m.tests}))
        folders.put(whole)
        if code != 0:
            print(f"{output}\nthe tests fail without any mutant", file=sys.stderr)
            return 1
        with ThreadPoolExecutor(args.jobs) as threads:
            ends = list(threads.map(lambda mutant: try_mutant(mutant, folders), mutants))
    return report(mutants, ends)


def report(mutants: Sequence[Mutant], ends: Sequence[str]) -> int:
    """Print a table by file, and what was not killed; 1 if there is any."""
    counts = Counter(mutant.file for mutant in mutants)
    killed = Counter(m.file for m, end in zip(mutants, ends, strict=True) if end == "killed")
    print()
    for file, count in counts.items():
        print(f"{killed[file]:3} of {count:3}  {file}")
    print(f"{sum(killed.values()):3} of {len(mutants):3}  killed")
    alive = [(m, end) for m, end in zip(mutants, ends, strict=True) if end != "killed"]
    for mutant, end in alive:
        print(f"{end}: {mutant.file}: {mutant.name}")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
