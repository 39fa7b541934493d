"""A checkpoint's files are data: what else they hold is refused by name, and nothing of it runs."""

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from phi3v.errors import CheckpointError
from phi3v.training.checkpoints import resuming, saving
from phi3v.training.checkpoints.loading import FORCE, FORCE_NOT, data_only, load_data
from tests.training.planted import Code, plant

pytestmark = [
    pytest.mark.filterwarnings("ignore:(Detected pickle protocol|.*looks like a TorchScript)"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What is there once planted code has run."""
    return tmp_path / "RAN"


@pytest.fixture
def folder(tmp_path: Path, mark: Path) -> Path:
    """A folder with a good file and a planted one."""
    (tmp_path / "step").mkdir()
    for name in ("a.pt", "b.pt"):
        torch.save({"weight": torch.ones(3)}, tmp_path / "step" / name)
    plant(tmp_path / "step" / "b.pt", mark)
    return tmp_path / "step"


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_data(path)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_planted_code_does_not_run_and_is_named_with_its_file(folder: Path, mark: Path) -> None:
    assert load_data(folder / "a.pt")["weight"].tolist() == [1, 1, 1]
    said = refusal(folder / "b.pt")
    assert said.startswith(f"{folder / 'b.pt'} names posix.system, which is code and not data, so ")
    assert not mark.exists()
    torch.load(folder / "b.pt", weights_only=False)
    assert mark.exists(), "the planted file is none"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("is_zip", [True, False])
def test_nor_does_it_in_another_form_of_pickle(
    protocol: int, is_zip: bool, tmp_path: Path, mark: Path
) -> None:
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": is_zip}
    torch.save({"extra": Code(mark)}, tmp_path / "a.pt", **options)  # type: ignore[arg-type]
    refusal(tmp_path / "a.pt")
    assert not mark.exists()


def test_a_program_of_torchs_is_refused_as_well(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "a.pt")  # type: ignore[no-untyped-call]
    assert "cannot be read as tensors and plain values" in refusal(tmp_path / "a.pt")


def test_what_is_no_such_file_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"half a file")
    said = refusal(tmp_path / "a.pt")
    assert said.startswith(f"{tmp_path / 'a.pt'} cannot be read as tensors and plain values (")
    assert said.endswith("bring it back from a copy, or take another checkpoint")


def test_what_a_file_names_is_printed_without_its_control_characters(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"\x80\x02c\x1b[2Jmod\nname\n.")
    assert " names [2Jmod.name, which is code and not data" in refusal(tmp_path / "a.pt")


def test_loads_that_ask_for_everything_get_data_alone(folder: Path, mark: Path) -> None:
    """As DeepSpeed's do, also where the user's environment asks for the opposite."""
    os.environ[FORCE_NOT] = "1"
    before, safe = dict(os.environ), torch.serialization.get_safe_globals()
    with pytest.raises(CheckpointError, match=f"^{folder}/b.pt names posix.system"):
        with data_only(folder):
            assert torch.load(folder / "a.pt", weights_only=False)["weight"].sum() == 3
            assert os.environ[FORCE] == "1", "children of this process would read everything"
            torch.load(folder / "b.pt", weights_only=False)
    assert not mark.exists()
    assert dict(os.environ) == before
    assert set(torch.serialization.get_safe_globals()) == set(safe)


def test_what_deepspeed_saves_beside_tensors_is_read(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    place = fragment_address(numel=3, start=5)
    state = {"at": OrderedDict(weight=place), "scaler": LossScaler(8.0), "stage": ZeroStageEnum(2)}
    torch.save(state, tmp_path / "a.pt")
    ours = load_data(tmp_path / "a.pt")
    assert ours["at"]["weight"].state == {"numel": 3, "start": 5}
    with data_only(tmp_path):
        theirs = torch.load(tmp_path / "a.pt", weights_only=False)
    assert theirs["at"]["weight"] == place and theirs["stage"] == 2
    assert theirs["scaler"].cur_scale == 8.0


def drawn() -> list[Any]:
    return [np.random.rand(), torch.rand(1).item()]


def test_random_states_are_plain_and_those_of_a_run_of_before_are_read(tmp_path: Path) -> None:
    np.random.standard_normal()  # leaves half a pair for the next
    states = saving.random_states()
    old = states | {"numpy": np.random.get_state()}
    expected = drawn()
    torch.save(states, tmp_path / "a.pt")
    torch.save(old, tmp_path / "old.pt")
    torch.load(tmp_path / "a.pt", weights_only=True)
    for name in ("a.pt", "old.pt"):
        resuming.set_random_states(load_data(tmp_path / name))
        assert drawn() == expected, name
