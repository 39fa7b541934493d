"""A checkpoint of other ranks is converted once, verified whenever it is used, and goes in time."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed

from phi3v.data.packing import Position
from phi3v.errors import CheckpointError
from phi3v.training.checkpoints.convert import convert
from phi3v.training.checkpoints.resuming import Choice, choose
from phi3v.training.checkpoints.store import (
    MANIFEST,
    SavedFile,
    find_damage,
    partial_name,
    publish,
    read_manifest,
    remove,
    retain,
    step_name,
    universal_name,
    write_manifest,
)
from phi3v.training.ranks import Ranks
from tests.training.saved import flip, names
from tests.training.test_publishing import crashes

pytestmark = pytest.mark.usefixtures("group_of_one")
ONE = Ranks(rank=0, world_size=1, local_rank=0, local_size=1)
TAG, CONVERTED = step_name(3), universal_name(3)
SHAPES = {"bias": torch.Size([6]), "weight": torch.Size([4, 6])}
MOMENTS = ("exp_avg", "exp_avg_sq")
SAVED_BY = 2  # ranks
Capture = pytest.CaptureFixture[str]


def save_ranks(folder: Path, step: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """A checkpoint of two ranks as ZeRO-3 writes it; returns what it holds, by file in `zero/`."""
    chance = torch.Generator().manual_seed(seed)
    partial = folder / partial_name(step)
    partial.mkdir(parents=True)
    shares = torch.randn(3, SAVED_BY, 15, generator=chance)  # (kind, rank, 3 of bias, 12 of weight)
    for rank, (masters, *moments) in enumerate(shares.unbind(1)):
        options = {"lr": 0.1, "params": [0], "name": "head"}
        state = {0: {"step": torch.tensor(7.0), **dict(zip(MOMENTS, moments, strict=True))}}
        optimizer = {
            "zero_stage": 3,
            "partition_count": SAVED_BY,
            "fp32_flat_groups": [masters.clone()],
            "optimizer_state_dict": {"state": state, "param_groups": [options]},
        }
        model = {"param_shapes": [SHAPES], "module": {}, "buffer_names": [], "shared_params": {}}
        start = partial / f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"optimizer_state_dict": optimizer}, f"{start}_optim_states.pt")
        torch.save(model, f"{start}_model_states.pt")
    facts = {"step": step, "world_size": SAVED_BY, "zero_stage": 3, "position": vars(Position())}
    write_manifest(partial, facts, {path.name: SavedFile.of(path) for path in partial.iterdir()})
    publish(folder, step)
    return {
        f"{name}/{kind}.pt": values[:, part].flatten()
        for kind, values in zip(("fp32", *MOMENTS), shares, strict=True)
        for name, part in (("bias", slice(0, 3)), ("weight", slice(3, 15)))
    }


def take_up(folder: Path) -> Choice:
    """What one rank goes on from, of what two have saved."""
    choice = choose(folder, ONE, lambda: None)
    assert choice is not None and (choice.tag, choice.is_converted) == (CONVERTED, True)
    return choice


def assert_holds(universal: Path, expected: dict[str, torch.Tensor]) -> None:
    assert find_damage(universal) is None
    for name, tensor in expected.items():
        saved = torch.load(universal / "zero" / name, weights_only=False)
        assert (saved["param"] if isinstance(saved, dict) else saved).equal(tensor), name


def test_a_converted_checkpoint_has_a_manifest_of_all_its_files_and_is_used_again(
    tmp_path: Path, capsys: Capture
) -> None:
    expected = save_ranks(tmp_path)
    assert take_up(tmp_path).manifest == read_manifest(tmp_path / TAG)
    assert f"converting {TAG} from 2 ranks to any number" in capsys.readouterr().err
    universal = tmp_path / CONVERTED
    assert_holds(universal, expected)
    files = {str(path.relative_to(universal)) for path in universal.rglob("*") if path.is_file()}
    manifest = read_manifest(universal)
    assert manifest["files"].keys() == files - {MANIFEST} and len(files) > len(expected)
    assert (manifest["step"], manifest["world_size"], manifest["zero_stage"]) == (3, "any", 3)
    take_up(tmp_path)
    assert capsys.readouterr().err == ""
    assert read_manifest(universal) == manifest, "it was not made a second time"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_an_older_one_taken(
    tmp_path: Path, capsys: Capture, damage: Callable[[Path], None]
) -> None:
    expected = save_ranks(tmp_path)
    save_ranks(tmp_path, step=4, seed=1)
    damaged = tmp_path / step_name(4)
    damage(damaged / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    take_up(tmp_path)
    said = f"{damaged} is damaged, an older one is taken: zero_pp_rank_1_mp_rank_00_optim_states.pt"
    assert said in capsys.readouterr().err
    assert_holds(tmp_path / CONVERTED, expected)
    damage(tmp_path / TAG / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError):
        choose(tmp_path, ONE, lambda: None)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", ["zero/weight/exp_avg.pt", "zero/optimizer_state.pt", MANIFEST])
def test_a_damaged_converted_checkpoint_is_made_again_from_its_checkpoint_and_said(
    tmp_path: Path, capsys: Capture, damage: Callable[[Path], None], name: str
) -> None:
    expected = save_ranks(tmp_path)
    take_up(tmp_path)
    damage(tmp_path / CONVERTED / name)
    capsys.readouterr()
    take_up(tmp_path)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"{tmp_path / CONVERTED} is damaged and is made again: {name} ")
    assert second.startswith(f"converting {TAG} from 2 ranks")
    assert_holds(tmp_path / CONVERTED, expected)
    assert names(tmp_path) == [CONVERTED, "latest", TAG]


def test_no_file_of_a_converted_checkpoint_may_change_unseen(tmp_path: Path) -> None:
    save_ranks(tmp_path)
    take_up(tmp_path)
    universal = tmp_path / CONVERTED
    files = [path for path in universal.rglob("*") if path.is_file()]
    for path in files:
        flip(path)
        assert find_damage(universal) is not None, path
        flip(path)
    assert find_damage(universal) is None


def test_what_was_made_from_another_checkpoint_of_the_step_is_not_used(
    tmp_path: Path, capsys: Capture
) -> None:
    """Saving the step again removes it; one that comes back from a copy is known for what it is."""
    save_ranks(tmp_path)
    take_up(tmp_path)
    shutil.copytree(tmp_path / CONVERTED, tmp_path / "copy")
    expected = save_ranks(tmp_path, seed=1)
    assert names(tmp_path) == ["copy", "latest", TAG]
    shutil.move(tmp_path / "copy", tmp_path / CONVERTED)
    capsys.readouterr()
    take_up(tmp_path)
    said = f"made again: it was made from another {TAG} than this one\n"
    assert said in capsys.readouterr().err
    assert_holds(tmp_path / CONVERTED, expected)


def test_a_form_of_before_whose_manifest_is_its_checkpoints_is_made_again(
    tmp_path: Path, capsys: Capture
) -> None:
    expected = save_ranks(tmp_path)
    take_up(tmp_path)
    shutil.copy2(tmp_path / TAG / MANIFEST, tmp_path / CONVERTED / MANIFEST)
    take_up(tmp_path)
    assert "is damaged and is made again: zero_pp_rank_0_mp" in capsys.readouterr().err
    assert_holds(tmp_path / CONVERTED, expected)


@pytest.mark.slow
def test_nothing_of_a_conversion_that_was_killed_is_used(tmp_path: Path) -> None:
    expected: dict[str, torch.Tensor] = {}

    def prepared(folder: Path) -> None:
        expected.update(save_ranks(folder))
        convert(folder / TAG, folder / CONVERTED)
        flip(folder / CONVERTED / "zero/bias/fp32.pt")

    def act(folder: Path) -> None:
        convert(folder / TAG, folder / CONVERTED)

    num_crashes = 0
    for folder in crashes(tmp_path, prepared, act):
        num_crashes += 1
        universal = folder / CONVERTED
        if universal.exists() and find_damage(universal) is None:
            assert_holds(universal, expected)
        take_up(folder)
        assert_holds(universal, expected)
        assert names(folder) == [CONVERTED, "latest", TAG]
        shutil.rmtree(folder)
    assert num_crashes > 50


@pytest.mark.parametrize(
    "drop", [lambda folder: remove(folder, 3), lambda folder: retain(folder, 1, 0, {})]
)
def test_a_converted_checkpoint_goes_with_its_checkpoint(
    tmp_path: Path, drop: Callable[[Path], None]
) -> None:
    save_ranks(tmp_path)
    take_up(tmp_path)
    save_ranks(tmp_path, step=4)
    drop(tmp_path)
    assert names(tmp_path) == ["latest", step_name(4)]


def test_one_whose_checkpoint_somebody_removed_goes_at_the_next_start(tmp_path: Path) -> None:
    save_ranks(tmp_path)
    take_up(tmp_path)
    shutil.rmtree(tmp_path / TAG)
    assert choose(tmp_path, ONE, lambda: None) is None
    assert names(tmp_path) == []
