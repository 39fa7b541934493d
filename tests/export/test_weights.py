"""Weights travel from the ranks' files to safetensors whole, and a damaged file is told."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from phi3v.errors import CheckpointError
from phi3v.export import export, open_run
from phi3v.export.weights import file_names, plan_shards, write_weights
from phi3v.model import Phi3VForCausalLM
from phi3v.training.checkpoints.reading import _stretches, open_weights
from tests.export.runs import expected, move_run, read, weights_of
from tests.training.saved import flip

SHARD = 2_000_000  # bytes


@pytest.fixture(scope="module")
def split(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The newest checkpoint in files of 2 MB."""
    out = tmp_path_factory.mktemp("split") / "out"
    export(made, out, shard_bytes=SHARD)
    return out


def test_a_disk_that_fills_is_told_with_the_file(made: Path, tmp_path: Path) -> None:
    weights = open_weights(made / "checkpoints", 2)
    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left.*/model.safetensors"):
        write_weights(weights, list(weights.shapes()), torch.float32, tmp_path)


def test_every_weight_is_read_from_all_ranks_in_float32(made: Path, tiny_model: Path) -> None:
    weights = open_weights(made / "checkpoints", 2)
    found = {name: weights.read(name) for name in weights.shapes()}
    assert found.keys() == expected(tiny_model, 2).keys()
    for name, tensor in expected(tiny_model, 2).items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor), name


def test_large_weights_are_split_into_files_with_an_index(split: Path, tiny_model: Path) -> None:
    files = sorted(path.name for path in split.glob("*.safetensors"))
    assert files == file_names(len(files)) and len(files) > 2
    assert all((split / file).stat().st_size < SHARD + 20_000 for file in files)
    index = read(split / "model.safetensors.index.json")
    tensors = expected(tiny_model, 3)
    assert index["weight_map"].keys() == tensors.keys()
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
    reloaded = Phi3VForCausalLM.from_pretrained(split).state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(reloaded[name], tensor), name


def test_the_files_are_those_that_safetensors_reads(split: Path) -> None:
    for path in split.glob("*.safetensors"):
        with safe_open(path, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
        head = int.from_bytes(path.read_bytes()[:8], "little")
        assert (8 + head) % 64 == 0
        assert path.stat().st_mode == (split / "config.json").stat().st_mode


def test_half_precision_is_rounded_once(made: Path, tiny_model: Path, tmp_path: Path) -> None:
    export(made, tmp_path / "out", step=2, dtype="bf16")
    found = weights_of(tmp_path / "out")
    for name, tensor in expected(tiny_model, 2).items():
        assert torch.equal(found[name], tensor.bfloat16()), name
    assert read(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"


@given(st.lists(st.integers(0, 4), max_size=5), st.data())
def test_a_stretch_may_go_over_several_tensors(lengths: list[int], data: st.DataObject) -> None:
    whole = torch.arange(sum(lengths))
    start = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.integers(0, len(whole) - start))
    parts = list(_stretches(whole.split(lengths), start, length))
    assert [int(value) for part in parts for value in part] == list(range(start, start + length))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 12))
def test_shards_hold_every_name_in_order_and_no_more_than_they_may(
    sizes: list[int], limit: int
) -> None:
    named = {f"w{n}": size for n, size in enumerate(sizes)}
    shards = plan_shards(named, limit)
    assert [name for shard in shards for name in shard] == list(named)
    for shard in shards:
        assert len(shard) == 1 or sum(named[name] for name in shard) <= limit
    for one, after in zip(shards, shards[1:], strict=False):
        assert sum(named[name] for name in one) + named[after[0]] > limit


def test_a_flipped_bit_of_a_checkpoint_is_found_before_it_is_used(
    made: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(made, tmp_path / "run")
    damaged = next((run / "checkpoints/step-00000003").glob("*rank_1*optim*"))
    flip(damaged)
    for ask in (lambda: export(run, tmp_path / "out"), lambda: open_run(run, 4, 1)):
        with pytest.raises(CheckpointError) as caught:
            ask()
        message = str(caught.value)
        assert f"step-00000003 is damaged: {damaged.name} has SHA-256 " in message
        assert message.endswith("; bring the file back from a copy, or name another step")
    assert not (tmp_path / "out").exists()
    export(run, tmp_path / "out", step=2)


def test_a_checkpoint_that_is_being_written_is_not_seen(
    made: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(made, tmp_path / "run")
    (run / "checkpoints/step-00000003").rename(run / "checkpoints/.step-00000003.partial")
    export(run, tmp_path / "out")
    assert json.loads((tmp_path / "out/phi3v_export.json").read_text())["checkpoint"] == (
        "step-00000002"
    )


def test_a_base_that_was_exchanged_is_refused(made: Path, base: Path, tmp_path: Path) -> None:
    config = read(base / "config.json")
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match="do not fit the model's config.json: 6 unknown: "):
        export(move_run(made, base, tmp_path / "run"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
