"""Look the locked versions up among PyPI's known vulnerabilities, by pip-audit: `make audit`.

Exit code 0: none is known; 1: some are, a line each; 2: not all could be looked up, and no
vulnerability is known of the others.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LISTS = ("build", "torch", "packages", "test", "tools")  # cpu.txt has torch's version once more


def main() -> None:
    command = [sys.executable, "-m", "pip_audit", "--require-hashes", "--disable-pip"]
    command += ["--progress-spinner=off", "--format=json"]
    command += [f"--requirement={HERE / f'{name}.txt'}" for name in LISTS]
    done = subprocess.run(command, capture_output=True, text=True)
    sys.exit(tell(done.stdout, done.stderr))


def tell(found: str, said: str) -> int:
    """Print what pip-audit has found, JSON, or said instead; returns the exit code."""
    try:
        packages: list[dict[str, Any]] = json.loads(found)["dependencies"]
    except ValueError:
        last = (said.strip().splitlines() or ["it said nothing"])[-1]
        print(f"nothing was looked up; pip-audit ended with: {last}", file=sys.stderr)
        return 2
    known = [(package, fault) for package in packages for fault in package.get("vulns", ())]
    for package, fault in known:
        names = ", ".join([fault["id"], *fault["aliases"]])
        fixed = ", ".join(fault["fix_versions"]) or "no version"
        print(f"{package['name']} {package['version']}: {names}; mended in {fixed}")
    skipped = [package for package in packages if "skip_reason" in package]
    if skipped:
        print(
            f"{len(skipped):,} of {len(packages):,} packages could not be looked up, such as: "
            f"{skipped[0]['skip_reason']}; run make audit where PyPI itself can be reached",
            file=sys.stderr,
        )
    print(f"{len(known):,} known vulnerabilities in {len(packages) - len(skipped):,} packages")
    return 1 if known else 2 if skipped else 0


if __name__ == "__main__":
    main()
