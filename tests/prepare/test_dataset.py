"""The dataset folder: published whole or not at all, the same each time, never mixed up."""

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from phi3v.config import DatasetConfig
from phi3v.data import Dataset
from phi3v.data.writer import ShardWriter
from phi3v.errors import ConfigError, ShardError
from phi3v.files import sha256
from phi3v.prepare import prepare, verify
from phi3v.sample import Sample
from tests.tiny import make_model, product_recipe, recipe, turn, write_jsonl

ROWS = [
    turn(f"Question {k}", f"Answer {k}", id=f"r{k}", category=f"g{k % 40}", task="x" * (k % 7))
    for k in range(200)
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


def text_recipe(model: Path, source: Path, out: Path, **values: Any) -> DatasetConfig:
    return recipe(model, out, {"path": str(source)}, **values)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: data for name, (data, _) in snapshot(folder).items()}


def refusal(cfg: DatasetConfig, error: type[Exception] = ConfigError) -> str:
    with pytest.raises(error) as caught:
        prepare(cfg)
    return str(caught.value)


# What is in the folder


def test_the_manifest_says_what_is_in_the_folder(tiny_shards: Path, tiny_model: Path) -> None:
    manifest = json.loads((tiny_shards / "manifest.json").read_text(encoding="utf-8"))
    files = {"manifest.json", "rejected.jsonl"}
    for split, entry in manifest["splits"].items():
        dataset = Dataset(tiny_shards, split)
        assert entry["samples"] == len(dataset) == sum(s["samples"] for s in entry["shards"])
        for name in ("tokens", "label_tokens", "image_tokens", "views"):
            assert entry[name] == getattr(dataset, name).sum() > 0
        for file in (*entry["shards"], entry["index"]):
            files.add(file["file"])
            assert file["bytes"] == (tiny_shards / file["file"]).stat().st_size
            assert file["sha256"] == sha256(tiny_shards / file["file"])
    assert {path.name for path in tiny_shards.iterdir()} == files
    assert manifest["format_version"] == 2
    assert manifest["rows"] == 120 and manifest["rejected"] == {"count": 0, "by_reason": {}}
    assert (manifest["crop_size"], manifest["image_side"], manifest["num_crops"]) == (56, 2, 4)
    assert manifest["recipe"]["inputs"]["tokenizer.json"] == sha256(tiny_model / "tokenizer.json")
    assert len(manifest["fingerprint"]) == 64
    assert manifest["recipe"]["split"] == {
        "validation": 0.1,
        "by": "product_code",
        "stratify": None,
        "near_duplicates": "together",
        "seed": 0,
    }


def test_a_canvas_takes_three_bytes_a_pixel_on_the_disk(tiny_shards: Path) -> None:
    """The formula of docs/data.md: 3 * height * width, and about 1 kB beside it."""
    dataset = Dataset(tiny_shards, "train")
    pixels = sum(3 * h * w for s in dataset for h, w in [canvas.size for canvas in s.images])
    size = sum(shard["bytes"] for shard in dataset.entry["shards"])
    assert pixels < size < pixels + 1500 * len(dataset)


def test_num_crops_of_the_recipe_beats_the_models(
    catalogue: Path, tiny_model: Path, tmp_path: Path
) -> None:
    prepare(product_recipe(catalogue, tiny_model, tmp_path / "one", num_crops=1))
    dataset = Dataset(tmp_path / "one", "train")
    assert dataset.manifest["num_crops"] == 1
    assert set(dataset.views.tolist()) == {2}


def test_verify_checks_every_split(tmp_path: Path, source: Path, tiny_model: Path) -> None:
    out = tmp_path / "out"
    prepare(text_recipe(tiny_model, source, out, split={"validation": 0.3}))
    verify(out)
    path = out / "validation-00000.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match="validation-00000.arrow has SHA-256"):
        verify(out)


# The same recipe, and another


def test_the_same_recipe_again_changes_nothing(
    tmp_path: Path, source: Path, tiny_model: Path
) -> None:
    cfg = text_recipe(tiny_model, source, tmp_path / "out")
    first = prepare(cfg)
    before = snapshot(tmp_path / "out")
    assert prepare(cfg) == first
    assert snapshot(tmp_path / "out") == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({"num_crops": 2}, "num_crops"),
        ({"split": {"validation": 0.1, "seed": 1}}, "split.validation, split.seed"),
        ({"max_tokens": 99, "max_rejected": 0}, "max_tokens, max_rejected"),
        ({"shard_bytes": 1000}, "shard_bytes"),
    ],
)
def test_another_recipe_is_refused_with_the_keys_that_differ(
    tmp_path: Path, source: Path, tiny_model: Path, values: dict[str, Any], keys: str
) -> None:
    out = tmp_path / "out"
    prepare(text_recipe(tiny_model, source, out))
    before = snapshot(out)
    assert refusal(text_recipe(tiny_model, source, out, **values)) == (
        f"{out} was made by another recipe: {keys} differ; "
        "name another folder in 'out', or remove this one"
    )
    assert snapshot(out) == before


def test_a_changed_source_is_another_recipe(tmp_path: Path, source: Path, tiny_model: Path) -> None:
    cfg = text_recipe(tiny_model, source, tmp_path / "out")
    prepare(cfg)
    write_jsonl(source, ROWS[1:])
    assert "made by another recipe: inputs.source differ" in refusal(cfg)


def test_a_changed_folder_of_datasets_is_another_recipe(tmp_path: Path, tiny_model: Path) -> None:
    datasets = pytest.importorskip("datasets")
    cfg = text_recipe(tiny_model, tmp_path / "saved", tmp_path / "out")
    for rows in (ROWS[:9], ROWS[1:10]):
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        if not (tmp_path / "out").exists():
            prepare(cfg)
    assert "made by another recipe: inputs.source differ" in refusal(cfg)


def test_a_changed_model_is_another_recipe(tmp_path: Path, source: Path, tiny_model: Path) -> None:
    """Of the model's folder the tokenizer, the crops and their size count, the weights do not."""
    model = tmp_path / "model"
    make_model(model)
    cfg = text_recipe(model, source, tmp_path / "out")
    prepare(cfg)
    make_model(model, width=64)
    prepare(cfg)
    make_model(model, image_size=84)
    message = refusal(cfg)
    assert "inputs.crop_size" in message and "inputs.image_side" in message
    make_model(model, num_crops=9, text_pieces=60)
    message = refusal(cfg)
    assert "inputs.tokenizer.json" in message and "inputs.preprocessor_config.json" in message


def test_a_dataset_that_lost_a_file_is_not_up_to_date(
    tmp_path: Path, source: Path, tiny_model: Path
) -> None:
    cfg = text_recipe(tiny_model, source, tmp_path / "out")
    prepare(cfg)
    (tmp_path / "out/train-00000.arrow").unlink()
    assert "train-00000.arrow is missing though the manifest" in refusal(cfg, ShardError)


def test_two_runs_give_the_same_bytes(
    catalogue: Path, tiny_model: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    split = {"validation": 0.1, "by": "product_code"}
    prepare(product_recipe(catalogue, tiny_model, tmp_path / "again", split=split))
    assert contents(tmp_path / "again") == contents(tiny_shards)


def test_the_fingerprint_is_of_recipe_and_data_not_of_the_folders_name(
    tmp_path: Path, source: Path, tiny_model: Path
) -> None:
    def fingerprint(name: str, **values: Any) -> str:
        return prepare(text_recipe(tiny_model, source, tmp_path / name, **values))["fingerprint"]

    one = fingerprint("one")
    assert fingerprint("two") == one
    assert fingerprint("three", max_rejected=0.5) != one
    write_jsonl(source, ROWS[1:])
    assert fingerprint("four") != one


# Whole or not at all


def test_a_prepare_that_dies_leaves_no_dataset_and_the_next_one_succeeds(
    tmp_path: Path, source: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dead one's shards are smaller, so more of them: none may stay."""
    add = ShardWriter.add

    def die(self: ShardWriter, sample: Sample, times: int = 1) -> None:
        if sample.id == "r100":
            raise KeyboardInterrupt
        add(self, sample, times)

    monkeypatch.setattr(ShardWriter, "add", die)
    with pytest.raises(KeyboardInterrupt):
        prepare(text_recipe(tiny_model, source, tmp_path / "out", shard_bytes=5000, workers=1))
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / ".out.partial").glob("train-*.arrow"))) > 3
    monkeypatch.undo()
    for name in ("out", "clean"):
        prepare(text_recipe(tiny_model, source, tmp_path / name))
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("is_file", [True, False])
def test_what_is_no_dataset_is_not_replaced(
    tmp_path: Path, source: Path, tiny_model: Path, is_file: bool
) -> None:
    mine = tmp_path / "out" if is_file else tmp_path / "out/thesis.txt"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    assert refusal(text_recipe(tiny_model, source, tmp_path / "out")) == (
        f"out {tmp_path}/out exists and is no dataset; name another, or remove this"
    )
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("name", ["out", ".out.partial"])
def test_a_link_to_somebodys_folder_is_neither_filled_nor_cleared(
    tmp_path: Path, source: Path, tiny_model: Path, name: str
) -> None:
    (tmp_path / "theirs").mkdir()
    if name == ".out.partial":  # an out that leads to a folder with files is no dataset
        (tmp_path / "theirs/thesis.txt").touch()
    before = list((tmp_path / "theirs").iterdir())
    (tmp_path / name).symlink_to(tmp_path / "theirs")
    found = refusal(text_recipe(tiny_model, source, tmp_path / "out"))
    assert str(tmp_path / name) in found and "is a link" in found
    assert list((tmp_path / "theirs").iterdir()) == before


def test_a_file_in_the_place_of_unfinished_work_is_refused(
    tmp_path: Path, source: Path, tiny_model: Path
) -> None:
    (tmp_path / ".out.partial").touch()
    found = refusal(text_recipe(tiny_model, source, tmp_path / "out"))
    assert f"{tmp_path}/.out.partial, where the unfinished work on {tmp_path}/out lies, is" in found


def test_out_may_be_an_empty_folder_or_the_current_one(
    tmp_path: Path, source: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    prepare(text_recipe(tiny_model, source, tmp_path / "a/b"))
    verify(tmp_path / "a/b")
    monkeypatch.chdir(tmp_path)
    assert refusal(text_recipe(tiny_model, source, Path("."))).startswith("out . exists and is no")


# Sources without use


def test_a_source_without_rows_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n")
    cfg = recipe(
        tiny_model,
        tmp_path / "out",
        {"path": str(tmp_path / "rows.csv"), "user": "{a}", "assistant": "{b}"},
    )
    assert refusal(cfg) == f"source.path {tmp_path}/rows.csv holds no rows; check the file"
    assert not (tmp_path / "out").exists()


def test_a_missing_source_is_refused_before_any_work(tmp_path: Path, tiny_model: Path) -> None:
    assert refusal(text_recipe(tiny_model, tmp_path / "gone.csv", tmp_path / "out")) == (
        f"source.path {tmp_path}/gone.csv does not exist; check the path in the recipe"
    )
    assert not list(tmp_path.iterdir())


def test_rows_that_are_all_held_out_are_refused(
    tmp_path: Path, source: Path, tiny_model: Path
) -> None:
    write_jsonl(source, ROWS[:2])
    cfg = text_recipe(tiny_model, source, tmp_path / "out", split={"validation": 0.999})
    assert refusal(cfg) == (
        f"source.path {source} gave no training sample: of 2 rows 2 are held out and 0 rejected; "
        "give more rows, or lower split.validation 0.999"
    )


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json", "config.json"])
def test_a_model_folder_that_lacks_a_file_is_named(
    tmp_path: Path, source: Path, tiny_model: Path, name: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_model.iterdir():
        if path.name != name:
            (model / path.name).symlink_to(path)
    assert refusal(text_recipe(model, source, tmp_path / "out")) == (
        f"model {model} has no {name}; name a model folder such as models/tiny, or a hub model"
    )


# The split


def split_ids(folder: Path) -> dict[str, list[str]]:
    return {split: [s.id for s in Dataset(folder, split)] for split in ("train", "validation")}


def test_a_split_by_a_column_keeps_equal_values_together(
    tmp_path: Path, source: Path, tiny_model: Path
) -> None:
    split = {"validation": 0.3, "by": "category"}
    prepare(text_recipe(tiny_model, source, tmp_path / "out", split=split))
    sides = defaultdict(set)
    for side, names in split_ids(tmp_path / "out").items():
        for name in names:
            sides[int(name[1:]) % 40].add(side)
    assert all(len(side) == 1 for side in sides.values())
    assert {next(iter(side)) for side in sides.values()} == {"train", "validation"}
    assert sum(side == {"validation"} for side in sides.values()) == pytest.approx(12, abs=6)


@pytest.mark.parametrize("by", ["category", None])
def test_a_rows_side_does_not_depend_on_the_other_rows(
    tmp_path: Path, source: Path, tiny_model: Path, by: str | None
) -> None:
    split = {"validation": 0.3, "by": by}
    prepare(text_recipe(tiny_model, source, tmp_path / "all", split=split))
    fewer = write_jsonl(tmp_path / "fewer.jsonl", ROWS[::-1][::3])
    prepare(text_recipe(tiny_model, fewer, tmp_path / "some", split=split))
    everything, some = split_ids(tmp_path / "all"), split_ids(tmp_path / "some")
    for side in ("train", "validation"):
        assert some[side]
        assert set(some[side]) <= set(everything[side])


def test_the_seed_decides_who_is_held_out(tmp_path: Path, source: Path, tiny_model: Path) -> None:
    held_out = []
    for number, seed in enumerate([0, 0, 1]):
        split = {"validation": 0.3, "seed": seed}
        prepare(text_recipe(tiny_model, source, tmp_path / f"{number}", split=split))
        held_out.append(split_ids(tmp_path / f"{number}")["validation"])
    assert held_out[0] == held_out[1] != held_out[2]
    assert len(held_out[0]) == pytest.approx(60, abs=25)


def test_the_split_is_that_of_the_first_release(
    tmp_path: Path, source: Path, tiny_model: Path
) -> None:
    """A run on data prepared again must not train on what an earlier one held out."""
    prepare(text_recipe(tiny_model, source, tmp_path / "out", split={"validation": 0.1}))
    text = ",".join(split_ids(tmp_path / "out")["validation"])
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == "8736bd1dd694", text


def test_without_a_share_nothing_is_held_out(
    tmp_path: Path, source: Path, tiny_model: Path
) -> None:
    manifest = prepare(text_recipe(tiny_model, source, tmp_path / "out"))
    assert manifest["splits"].keys() == {"train"}
    assert manifest["splits"]["train"]["samples"] == len(ROWS)
