"""Every command of the README does what it says, in the order in which a reader meets them."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from phi3v.config import DatasetConfig, RunConfig, load_recipe
from phi3v.config.load import build_recipe
from phi3v.training.ranks import free_port
from tests.commands import BIN, ROOT, metrics, run

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Runs are cut short; what a command does stays the same.
SHORT = ["train.max_steps=2", "eval.rows=4"]
ELSEWHERE = {
    "make setup": "is what makes this test's environment",
    "make test": "is what runs this test",
    "make nightly": "is what .ci/run ends with",
    "make demo": "tests/test_demo.py",
    "make soak": "tests/distributed/test_kills.py and test_soak.py, a few times",
    "make mutants": "tests/test_mutants.py, on faults of its own",
    "make bench": "tests/test_benchmarks.py, each smaller",
    "make gpu": "tests/test_benchmarks.py, at toy size on CPU ranks",
    "source .venv/bin/activate": "tests/test_readme.py, by way of PATH",
    "python launch/recipes/digits.py": "tests/test_digits.py",
    "python launch/tiny_model.py models/digits": "tests/test_digits.py",
    "python launch/prepare.py launch/recipes/digits_shards.yaml": "tests/test_digits.py",
    "deepspeed --num_gpus 2 launch/train.py launch/recipes/digits.yaml": "tests/test_digits.py",
    "sbatch": "tests/slurm/test_train.py",
    "slurm/prepare.sh 64": "tests/slurm/test_prepare.py",
    "deepspeed launch/train.py launch/recipes/phi35.yaml": "needs the published weights",
}


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def adapted(command: str) -> list[str]:
    """The command with a port of its own, and cut short if it trains or draws."""
    words = shlex.split(command)
    if "launch/train.py" in words:
        words += SHORT
    if words[0] == "deepspeed":
        words[1:1] = ["--master_port", str(free_port())]
    if "launch/evaluate.py" in words:
        words.append("eval.rows=4")
    if "launch/products.py" in words:
        words[words.index("3000")] = "150"
    return words


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the project's files but none of what earlier runs left."""
    for name in ("launch", "ds_configs", "slurm"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.slow
def test_every_command_runs(checkout: Path) -> None:
    ran = 0
    for command in commands():
        if command.startswith(tuple(ELSEWHERE)):
            continue
        words = adapted(command)
        program = BIN / words[0]
        done = run(program, *words[1:], cwd=checkout)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 15
    for name in ("products", "one", "two", "three"):
        assert len(metrics(checkout / "runs" / name)) == 2


def test_what_is_left_to_other_tests_is_in_the_readme() -> None:
    for command in ELSEWHERE:
        assert any(line.startswith(command) for line in commands()), command


def test_make_knows_the_targets_of_the_readme() -> None:
    for command in (c for c in commands() if c.startswith("make ")):
        done = subprocess.run(
            ["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_the_yaml_of_the_readme_is_a_recipe(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(block, encoding="utf-8")
    shipped = load_recipe(DatasetConfig, ROOT / "launch/recipes/products.yaml", [])
    assert load_recipe(DatasetConfig, path, []) == shipped


def test_the_row_of_the_readme_is_a_conversation() -> None:
    (block,) = blocks("json")
    row = json.loads(block)
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
    short = re.search(r"`(source: \{path: chats.*?\})`", README)
    assert short
    values = yaml.safe_load(short[1]) | {"model": "models/tiny", "out": "shards/chats"}
    recipe = build_recipe(DatasetConfig, values, Path("README.md"), [])
    assert recipe.source.format == "messages"


@pytest.mark.parametrize("path", sorted((ROOT / "launch/recipes").glob("*.yaml")), ids=str)
def test_shipped_recipes_are_valid(path: Path) -> None:
    is_dataset = "source" in yaml.safe_load(path.read_text(encoding="utf-8"))
    load_recipe(DatasetConfig if is_dataset else RunConfig, path, [])
