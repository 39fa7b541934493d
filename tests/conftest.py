"""What every test stands on: no ranks of a launcher, no hub, one thread; small real inputs."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # is read when huggingface_hub is imported
os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that tests start
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each command would compile the project anew

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from phi3v.training.ranks import RANK_VARIABLES
from tests.browser import Browser, started
from tests.tiny import make_catalogue, make_mixed_shards, make_model, make_shards

# Files by the time they take, longest first: one that begins last keeps the other worker waiting.
LONGEST = (
    *("distributed/test_train.py", "distributed/test_kills.py", "distributed/test_ds_configs.py"),
    *("slurm/test_requeue.py", "test_readme.py", "test_benchmarks.py", "test_digits.py"),
    *("distributed/test_world_size.py", "prepare/test_zoo.py", "prepare/test_restart.py"),
    *("distributed/test_shares.py", "test_demo.py", "slurm/test_train.py"),
    *("cuda/test_passes.py", "distributed/test_disks.py"),
    *("distributed/test_soak.py", "distributed/test_loading.py", "distributed/test_faults.py"),
    *("training/test_watchdog.py", "training/test_extensions.py", "distributed/test_stop_if.py"),
    "export/test_pictures.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first; `make test` keeps that order."""
    places = {str(Path(__file__).parent / name): place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(str(item.path), len(places)))


@pytest.fixture(scope="session", autouse=True)
def _one_rank() -> None:
    """Whatever started pytest, tests are no ranks; two threads on two busy cores are slower.

    What nohup starts ignores SIGHUP, and so does all that it starts: tests are of a terminal.
    """
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    torch.set_num_threads(1)
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """A command that is called in-process sets variables: they end with the test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 sample products: products.csv and images/."""
    return make_catalogue(tmp_path_factory.mktemp("catalogue"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights; do not write into it."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_shards(
    tmp_path_factory: pytest.TempPathFactory, catalogue: Path, tiny_model: Path
) -> Path:
    """The catalogue's dataset, splits train and validation; do not write into it."""
    return make_shards(catalogue, tiny_model, tmp_path_factory.mktemp("shards") / "products")


@pytest.fixture(scope="session")
def mixed_shards(
    tmp_path_factory: pytest.TempPathFactory, catalogue: Path, tiny_model: Path
) -> Path:
    """48 samples, every other one without a picture; none longer than 80 tokens."""
    return make_mixed_shards(catalogue, tiny_model, tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser that is asked for nothing and has nothing to complain about."""
    with started() as browser:
        yield browser
        assert browser.requests == []
        assert browser.complaints == []
