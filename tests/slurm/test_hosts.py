"""Several hosts without Slurm: the deepspeed launcher with a host file, on two namespaced hosts."""

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import BIN, LAUNCH, ROOT, metrics, start
from tests.commands import kill as kill_family

from .conftest import HOSTS, SECONDS, need_hosts

pytestmark = pytest.mark.slow
COMMAND = "--hostfile hosts.txt --no_ssh --node_rank {rank} --master_addr node1 --master_port 29500"


@pytest.fixture
def hosts() -> Iterator[Path]:
    """The folder of two hosts, node1 and node2."""
    need_hosts()
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder:
        subprocess.run([HOSTS, "up", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run([HOSTS, "down", folder], check=True)


def test_the_documented_command_on_each_host_trains_one_run(
    hosts: Path, tmp_path: Path, tiny_shards: Path, tiny_model: Path
) -> None:
    words = COMMAND.format(rank=0).split()
    assert f"deepspeed {' '.join(words)} launch/train.py" in (ROOT / "docs/slurm.md").read_text()
    (tmp_path / "hosts.txt").write_text("node1 slots=1\nnode2 slots=1\n")
    values = (f"model.path={tiny_model}", f"data.shards={tiny_shards}", "train.max_steps=3")
    short = ("run.out=run", "eval.rows=0", "wandb.mode=disabled")
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in (0, 1):
            on_host = (HOSTS, "on", hosts, f"node{rank + 1}")
            launcher = (BIN / "deepspeed", *COMMAND.format(rank=rank).split())
            script = (LAUNCH / "train.py", LAUNCH / "recipes/demo.yaml", *values, *short)
            process = start(*on_host, *launcher, *script, cwd=tmp_path)
            stack.callback(kill_family, process)
            processes.append(process)
        for process in processes:
            _, errors = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, errors
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]
    assert '"ranks": 2' in (tmp_path / "run" / "environment.json").read_text()
