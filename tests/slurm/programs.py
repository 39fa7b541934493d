"""Small programs that stand in a folder's launch/train.py, for tests of slurm/train.sh."""

import sys
from pathlib import Path

from tests.commands import ROOT

SCRIPT = ROOT / "slurm" / "train.sh"

# Counts to its first argument or until the file "enough" is there, ten a second, and goes on where
# it stopped; stops as training does.
COUNTER = """
import os, signal, sys, time
from pathlib import Path

asked = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: asked.append(1))
rank = os.environ["SLURM_PROCID"]
metrics = Path(f"counted-{rank}")
step = len(metrics.read_text().split()) if metrics.exists() else 0
while step < int(sys.argv[1]) and not Path("enough").exists():
    step += 1
    with metrics.open("a") as file:
        print(step, file=file)
    time.sleep(0.1)
    if asked:
        time.sleep(0.3)  # saves; the others do as well
        print(f"stopped after step {step}")
        for number in (signal.SIGTERM, signal.SIGUSR1):  # the first to leave causes one
            signal.signal(number, signal.SIG_IGN)
        sys.exit(75)
"""

# Two ranks that hear of each other's end, as ranks in a collective do. A second start ends at once.
TIED = """
import os, socket, time

place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
if os.environ["SLURM_PROCID"] == "0":
    other, _ = socket.create_server(place).accept()
else:
    time.sleep(1)
    other = socket.create_connection(place)
print("met")
if "SLURM_RESTART_COUNT" not in os.environ:
    other.recv(1)
    raise RuntimeError("Connection closed by peer")
"""


def put(folder: Path, program: str, name: str = "train.py") -> Path:
    """Write a program where the scripts expect it."""
    path = folder / "launch" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(program)
    return path


def on_two_nodes(*options: str, arguments: tuple[str, ...] = (), **variables: str) -> list[str]:
    """sbatch's arguments for slurm/train.sh."""
    exported = {"PHI3V_PYTHON": sys.executable, "RANK": "7"} | variables
    export = ",".join(["ALL", *(f"{name}={value}" for name, value in exported.items())])
    return ["-N2", f"--export={export}", *options, str(SCRIPT), *arguments]


def counted(folder: Path) -> list[int]:
    """The steps that the counter's first rank has done, over all its starts."""
    path = folder / "counted-0"
    return [int(word) for word in path.read_text().split()] if path.exists() else []
