"""What a run, a checkpoint or a model says of itself is read as data, or refused in one line."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from phi3v.config import read_mapping
from phi3v.errors import CheckpointError, ConfigError, Phi3VError, ShardError
from phi3v.model import Phi3VConfig
from phi3v.processing import Phi3VProcessor
from phi3v.stored import read_object
from phi3v.training.checkpoints.store import find_damage
from phi3v.training.run_folder import CONFIG, SUMMARY, RunFolder

NO_OBJECTS = {
    "empty": b"",
    "nuls": b"\0" * 200,
    "null": b"null",
    "list": b"[]",
    "number": b"1",
    "cut": b'{"fingerprint": "ab',
    "not_utf8": b'{"a": "\xff"}',
    "deep": b"[" * 100_000,
    "digits": b'{"a": ' + b"9" * 6000 + b"}",
}


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """A pipe that is waited for ends the test."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("waited for a pipe, or reads without an end")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("content", NO_OBJECTS.values(), ids=NO_OBJECTS)
def test_what_is_no_object_is_refused_with_its_file(tmp_path: Path, content: bytes) -> None:
    for name, read in {
        SUMMARY: RunFolder(tmp_path).read_summary,
        "data.json": lambda: RunFolder(tmp_path).check_data("ab"),
    }.items():
        (tmp_path / SUMMARY).write_text("{}")
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError) as error:
            read()
        assert str(error.value).startswith(f"{tmp_path / name} is ")
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("content", NO_OBJECTS.values(), ids=NO_OBJECTS)
def test_nor_does_a_recipe_of_a_run_end_in_a_traceback(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(ConfigError, match=str(tmp_path / CONFIG)):
        read_mapping(tmp_path / CONFIG)


@pytest.mark.parametrize("content", NO_OBJECTS.values(), ids=NO_OBJECTS)
def test_nor_does_the_config_of_a_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        Phi3VConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", ["hidden_size", "embd_layer", "attention_dropout"])
def test_a_config_of_wrong_types_is_refused_with_its_folder(tmp_path: Path, key: str) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "phi3_v", "{key}": "x"}}')
    with pytest.raises(ConfigError, match=f"config.json of {tmp_path} describes no"):
        Phi3VConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("put", [make_pipe, link_to_zeros])
def test_what_has_no_end_is_not_read(tmp_path: Path, put: Callable[[Path], None]) -> None:
    put(tmp_path / "manifest.json")
    assert "not a file" in (find_damage(tmp_path, ()) or "")
    with pytest.raises(ShardError, match="is a .*, not a file"):
        read_object(tmp_path / "manifest.json", ShardError)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
def test_a_pipe_in_a_model_folder_is_not_waited_for(
    tiny_model: Path, tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / name).unlink()
    make_pipe(folder / name)
    with pytest.raises(ConfigError, match=f"{name}.* is a pipe, not a file"):
        Phi3VProcessor.from_pretrained(folder)


def test_a_file_of_gigabytes_is_refused_by_its_size(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(1 << 36)  # no bytes on the disk
    assert "too large" in (find_damage(tmp_path, ()) or "")


def test_keys_that_are_needed_are_there_and_of_their_types(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('{"ranks": "2", "model": null}')
    for key in ("ranks", "model", "absent"):
        with pytest.raises(Phi3VError, match=f"must have '{key}', a int, and has"):
            read_object(path, needs={key: int})


@pytest.mark.parametrize(
    "line", ["a{n}: &a{n} [*a{m}, *a{m}, *a{m}, *a{m}]", "a{n}: &a{n} {{k: *a{m}, l: *a{m}}}"]
)
def test_aliases_that_multiply_are_refused(tmp_path: Path, line: str) -> None:
    lines = ["a0: &a0 [x, x]", *(line.format(n=n, m=n - 1) for n in range(1, 30))]
    (tmp_path / CONFIG).write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="with its aliases it has more than 100,000 values"):
        read_mapping(tmp_path / CONFIG)


def test_an_alias_in_itself_is_refused_and_one_that_saves_writing_is_not(tmp_path: Path) -> None:
    path = tmp_path / CONFIG
    path.write_text("a: &a [*a]")
    with pytest.raises(ConfigError, match="with its aliases"):
        read_mapping(path)
    path.write_text("a: &a {x: 1}\nb: *a\n")
    assert read_mapping(path) == {"a": {"x": 1}, "b": {"x": 1}}
