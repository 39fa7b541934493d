"""Folders and hub datasets give their rows as files do, streamed ones by way of a spool."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from phi3v.config.dataset import SourceSection
from phi3v.errors import ConfigError
from phi3v.prepare import hub, prepare
from phi3v.prepare.sources import Source, open_source, source_digest
from tests.tiny import recipe, write_picture

ROWS = [{"id": k, "text": f"row {k}", "lists": [{"a": k}] * (k % 3)} for k in range(500)]
READ = [
    row | {"image": {"bytes": b"no picture %d" % row["id"], "path": f"{row['id']}.png"}}
    for row in ROWS
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def with_images() -> datasets.Dataset:
    """Bytes that are no picture: whoever decodes them fails."""
    return datasets.Dataset.from_list(READ).cast_column("image", datasets.Image())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data files as a hub repository holds them: 300 rows and 200."""
    folder = tmp_path / "photos"
    folder.mkdir()
    dataset = with_images()
    dataset.select(range(300)).to_parquet(folder / "train-00000-of-00002.parquet")
    dataset.select(range(300, 500)).to_parquet(folder / "train-00001-of-00002.parquet")
    dataset.select(range(7)).to_parquet(folder / "validation-00000-of-00001.parquet")
    return folder


def opened(path: Any, work: Path, state: dict[str, Any] | None = None, **values: Any) -> Source:
    return open_source(SourceSection(path=str(path), **values), work, state)


def rows_of(source: Source, start: int = 0, stop: int = 10_000) -> list[dict[str, Any]]:
    rows = list(source.read(start, stop))
    assert [row.number for row in rows] == list(range(start, min(stop, source.num_rows)))
    return [row.values for row in rows]


def refusal(path: Any, work: Path, **values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        opened(path, work, **values)
    return str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_data_files_gives_its_rows_undecoded(
    folder: Path, tmp_path: Path, streaming: bool
) -> None:
    source = opened(folder, tmp_path / "work", streaming=streaming)
    assert source.num_rows == 500
    assert rows_of(source) == READ
    assert rows_of(source, 290, 310) == READ[290:310]
    assert len(rows_of(opened(folder, tmp_path / "work", split="validation"))) == 7


def test_a_source_is_opened_from_its_state_without_datasets(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = [
        opened(folder, tmp_path / "work", streaming=streaming).state()
        for streaming in (False, True)
    ]
    monkeypatch.setattr(hub, "_load", None)
    for state in json.loads(json.dumps(states)):
        assert rows_of(opened(folder, tmp_path / "work", state)) == READ


def test_a_folder_of_pictures_gives_their_paths(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_picture(tmp_path / f"pets/train/{name}/0.png")
    rows = rows_of(opened(tmp_path / "pets", tmp_path / "work"))
    assert [(row["label"], row["label"].id) for row in rows] == [("cat", 0), ("dog", 1)]
    assert rows[0]["image"] == {"bytes": None, "path": str(tmp_path / "pets/train/cat/0.png")}


def test_a_split_may_be_a_slice(folder: Path, tmp_path: Path) -> None:
    source = opened(folder, tmp_path / "work", split="train[50:60]")
    assert rows_of(source) == READ[50:60]


def test_a_streamed_dataset_is_spooled_up_to_max_rows(folder: Path, tmp_path: Path) -> None:
    source = opened(folder, tmp_path / "work", streaming=True, max_rows=100)
    (spooled,) = tmp_path.glob("work/*/*.arrow")
    with pa.memory_map(str(spooled)) as file:
        assert pa.ipc.open_stream(file).read_all().num_rows == 100
    assert rows_of(source) == READ[:100]


class Killed(Exception):
    pass


@pytest.mark.parametrize(("kills_after", "max_rows"), [(1, 450), (3, None)])
def test_a_spool_that_was_stopped_goes_on_where_it_was(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kills_after: int,
    max_rows: int | None,
) -> None:
    monkeypatch.setattr(hub, "PART_BYTES", 3000)
    drawn: list[int] = []
    written: list[Path] = []
    tables, replacing = hub._tables, hub.replacing

    def counted(*args: Any) -> Any:
        for table in tables(*args):
            drawn.append(table.num_rows)
            yield table

    def failing(path: Path) -> Any:
        written.append(path)
        if len(written) == kills_after + 1:
            raise Killed
        return replacing(path)

    monkeypatch.setattr(hub, "_tables", counted)
    monkeypatch.setattr(hub, "replacing", failing)
    with pytest.raises(Killed):
        opened(folder, tmp_path / "work", streaming=True, max_rows=max_rows)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("work/*/*.arrow")}
    assert len(before) == kills_after
    drawn.clear()
    source = opened(folder, tmp_path / "work", streaming=True, max_rows=max_rows)
    assert rows_of(source) == READ[:max_rows]
    assert sum(drawn) <= (max_rows or 500) - kills_after * 64
    assert {path: path.stat().st_mtime_ns for path in before} == before
    drawn.clear()
    again = opened(folder, tmp_path / "work", streaming=True, max_rows=max_rows)
    assert (rows_of(again), drawn) == (READ[:max_rows], [])


def test_files_of_other_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mixed").mkdir()
    datasets.Dataset.from_dict({"a": [1]}).to_parquet(tmp_path / "mixed/a.parquet")
    datasets.Dataset.from_dict({"b": ["x"]}).to_parquet(tmp_path / "mixed/b.parquet")
    message = refusal(tmp_path / "mixed", tmp_path / "work", streaming=True)
    assert "Couldn't cast b: string" in message and "\n" not in message


def test_two_streamed_sources_do_not_share_a_spool(folder: Path, tmp_path: Path) -> None:
    one = opened(folder, tmp_path / "work", streaming=True)
    other = opened(folder, tmp_path / "work", streaming=True, split="validation")
    assert (len(rows_of(one)), len(rows_of(other))) == (500, 7)


def test_of_saved_datasets_split_names_one(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_list([{"a": name}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    assert rows_of(opened(tmp_path / "both", tmp_path)) == [{"a": "train"}]
    assert rows_of(opened(tmp_path / "both", tmp_path, split="test")) == [{"a": "test"}]
    assert rows_of(opened(tmp_path / "both/test", tmp_path)) == [{"a": "test"}]
    assert refusal(tmp_path / "both", tmp_path, split="dev") == (
        f"source.path {tmp_path}/both has no split 'dev', it has: train, test; name one in "
        "source.split"
    )


def remarks(path: Path, model: Path, out: Path, **values: Any) -> list[str]:
    """What prepare says of a source before it counts samples."""
    source = {"path": str(path), "user": "What?", "assistant": "{a}"}
    said: list[str] = []
    prepare(recipe(model, out, source, **values), say=said.append)
    return [line for line in said if line.startswith("source.path")]


@pytest.mark.parametrize("is_saved", [False, True])
def test_a_split_of_which_nothing_is_read_is_said(
    tmp_path: Path, tiny_model: Path, is_saved: bool
) -> None:
    splits = {name: datasets.Dataset.from_list([{"a": name}]) for name in ("train", "test")}
    both = tmp_path / "both"
    if is_saved:
        datasets.DatasetDict(splits).save_to_disk(both)
    else:
        both.mkdir()
        for name, rows in splits.items():
            rows.to_parquet(both / f"{name}.parquet")
    assert remarks(both, tiny_model, tmp_path / "one") == [
        f"source.path {both} has splits of which nothing is read: test; source.split 'train' says "
        "which is"
    ]
    own = {"validation": {"split": "test"}}
    assert remarks(both, tiny_model, tmp_path / "other", split=own) == []


def test_a_saved_dataset_is_read_from_its_own_files(tmp_path: Path) -> None:
    with_images().select(range(9, -1, -1)).save_to_disk(tmp_path / "saved", num_shards=3)
    source = opened(tmp_path / "saved", tmp_path / "work")
    assert rows_of(source) == READ[9::-1]
    assert {Path(file).parent for file in source.state()["files"]} == {tmp_path / "saved"}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_or_config_that_is_not_there_is_refused(
    folder: Path, tmp_path: Path, streaming: bool
) -> None:
    message = refusal(folder, tmp_path, split="dev", streaming=streaming)
    assert message.startswith(f"source.path {folder} cannot be read by datasets: ")
    assert "['train', 'validation']" in message and "check source.split" in message
    assert "'large' not found" in refusal(folder, tmp_path, config="large", streaming=streaming)


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty", tmp_path).startswith(
        f"source.path {tmp_path}/empty cannot be read by datasets: The directory at "
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["owner/name", "DBQ/Burberry.Prices.United.States", "imdb"])
def test_a_hub_dataset_that_cannot_be_reached_is_refused_in_a_sentence(
    tmp_path: Path, name: str, streaming: bool
) -> None:
    message = refusal(name, tmp_path, streaming=streaming)
    assert message.startswith(
        f"source.path {name} is no file or folder, and cannot be read from the hub: "
    )
    assert message.endswith("check the path, or the dataset's name, config, split and revision")
    assert "\n" not in message and len(message) < 500
    with pytest.raises(ConfigError, match="cannot be read from the hub"):
        source_digest(SourceSection(path=name))


@pytest.mark.parametrize(
    "path", ["data/x.csv", "x.jsonl", "owner/x.parquet", "a/b/c", "./x", "/x/y", "../x", "x.XLSX"]
)
def test_a_path_that_is_no_name_does_not_exist(tmp_path: Path, path: str) -> None:
    assert refusal(path, tmp_path) == (
        f"source.path {path} does not exist; check the path in the recipe"
    )


def test_a_hub_dataset_in_the_cache_is_read_by_its_name(folder: Path, tmp_path: Path) -> None:
    datasets.load_dataset(str(folder))
    shutil.move(tmp_path / "cache/photos", tmp_path / "cache/owner___photos")
    source = opened("owner/photos", tmp_path / "work")
    assert (source.path, rows_of(source)) == ("owner/photos", READ)
    assert source_digest(source.section) == source_digest(source.section)
    assert source_digest(source.section) != source_digest(
        opened("owner/photos", tmp_path, split="validation").section
    )


def test_the_digest_of_a_folder_tells_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    digests = set()
    for name, content in (("a.csv", "x\n1\n"), ("a.csv", "x\n2\n"), ("b.csv", "x\n2\n")):
        for old in (tmp_path / "data").iterdir():
            old.unlink()
        (tmp_path / "data" / name).write_text(content)
        digests.add(source_digest(SourceSection(path=str(tmp_path / "data"))))
    assert len(digests) == 3
