"""Export and verification hold a layer or a tensor at a time, not the model."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, run
from tests.export.runs import make_run

pytestmark = pytest.mark.slow

SHARD = 48_000_000  # bytes
SIZES = {
    "hidden_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 2048,
    "num_hidden_layers": 14,
}
# Anonymous memory alone: mapped files are given back when the machine needs the room.
PROGRAM = """
import sys, threading, time
from pathlib import Path
from phi3v.training.ranks import set_environment
set_environment()
from phi3v.export import export

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch():
    while not done.is_set():
        seen.append(anonymous())
        time.sleep(0.001)

before, seen, done = anonymous(), [], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
export(Path(sys.argv[1]), Path(sys.argv[2]), shard_bytes=int(sys.argv[3]))
done.set()
watcher.join()
print(max(seen) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_an_export_takes_no_more_than_two_shards_of_memory(base: Path, tmp_path: Path) -> None:
    """Found: 30 MB of the 94 MB that it may; a reader of the whole model takes 241 MB."""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | SIZES))
    (base / "model.safetensors").unlink()  # the base's weights are not needed
    trained = make_run(tmp_path / "run", base)
    out = tmp_path / "out"
    done = run(sys.executable, "-c", PROGRAM, trained, out, SHARD, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    files = list(out.glob("*.safetensors"))
    total = sum(path.stat().st_size for path in files)
    grown = int(done.stdout.splitlines()[-1])
    assert total > 4 * SHARD
    assert grown <= 2 * max(path.stat().st_size for path in files), (grown, total)
    shutil.rmtree(trained)
    shutil.rmtree(out)
