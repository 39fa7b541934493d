"""The stub, compiled once."""

from pathlib import Path
from shutil import which

import pytest
import torch

from tests.cuda.stub import build


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if torch.backends.cuda.is_built():
        pytest.skip("torch is built for CUDA; its CPU build is needed to pretend a device")
    if which("g++") is None:
        pytest.skip("no g++ (apt-get install g++)")
    return build(tmp_path_factory.mktemp("stub"))
