"""Runs that were not trained, and copies of the base that a test may edit."""

import shutil
from pathlib import Path

import pytest

from tests.export.runs import make_run


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run with checkpoints of the steps 2 and 3; do not write into it."""
    return make_run(tmp_path_factory.mktemp("runs") / "animals", tiny_model, 2, 3)


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the base that a test may edit."""
    shutil.copytree(tiny_model, tmp_path / "base")
    return tmp_path / "base"
