"""Killed, cut in parts, done by more workers: the same bytes in the end, and none is lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from phi3v.config import DatasetConfig
from phi3v.data import Dataset
from phi3v.errors import ConfigError
from phi3v.locks import locked, take
from phi3v.prepare import Part, dataset, merge, prepare, prepare_part
from phi3v.prepare.scan import scan_chunk
from tests.commands import LAUNCH, run, start
from tests.tiny import recipe, turn, write_jsonl, write_picture

pytestmark = pytest.mark.slow

NUM_ROWS = 1300  # six chunks of the scan


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions on a few pictures, some of them broken, and some without one."""
    folder = tmp_path_factory.mktemp("rows")
    for number in range(20):
        write_picture(folder / f"{number}.png", width=40 + 7 * number, seed=number)
    whole = (folder / "3.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])  # its header is whole
    lines: list[Any] = []
    for number in range(NUM_ROWS):
        name = "cut.png" if number % 100 == 7 else f"{number % 20}.png"
        images = ["gone.png"] if number % 90 == 3 else [name] if number % 3 else []
        question = "<|image_1|>\nWhat?" if images else "What?"
        lines.append(turn(question, f"Answer {number}", id=f"r{number}", images=images))
    write_jsonl(folder / "rows.jsonl", lines)
    return folder


def config(rows: Path, model: Path, out: Path, **values: Any) -> DatasetConfig:
    settings = {"split": {"validation": 0.1}, "shard_bytes": 400_000, "workers": 1}
    return recipe(model, out, {"path": str(rows / "rows.jsonl")}, **(settings | values))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def written(folder: Path, names: set[str]) -> dict[str, int]:
    """When these shards were written."""
    return {name: (folder / f"{name}.arrow").stat().st_mtime_ns for name in names}


@pytest.fixture(scope="module")
def whole(rows: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the rows without a stop."""
    out = tmp_path_factory.mktemp("whole") / "out"
    manifest = prepare(config(rows, tiny_model, out))
    assert len(manifest["splits"]["train"]["shards"]) > 8
    assert manifest["rejected"]["by_reason"] == {
        "image does not exist": 15,
        "image cannot be read": 9,
    }
    return out


def test_every_row_is_prepared_or_rejected_once(whole: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    lines = [json.loads(line) for line in (whole / "rejected.jsonl").read_text().splitlines()]
    names = [line["id"] for line in lines]
    for split in manifest["splits"]:
        names += [sample.id for sample in Dataset(whole, split)]
    assert sorted(names) == sorted(f"r{k}" for k in range(NUM_ROWS))
    assert [line["row"] for line in lines] == sorted(line["row"] for line in lines)
    assert manifest["rows"] == NUM_ROWS and manifest["rejected"]["count"] == len(lines) == 24


def test_samples_stand_in_the_order_of_their_rows(whole: Path) -> None:
    for split in ("train", "validation"):
        numbers = [sample.meta["row"] for sample in Dataset(whole, split)]
        assert numbers == sorted(numbers)


def test_workers_do_not_change_a_byte(
    rows: Path, tiny_model: Path, whole: Path, tmp_path: Path
) -> None:
    prepare(config(rows, tiny_model, tmp_path / "out", workers=3))
    assert contents(tmp_path / "out") == contents(whole)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_parts_do_not_change_a_byte(
    rows: Path, tiny_model: Path, whole: Path, tmp_path: Path, count: int
) -> None:
    cfg = config(rows, tiny_model, tmp_path / "out")
    for _ in ("scan", "write"):
        for number in random.sample(range(1, count + 1), count):
            prepare_part(cfg, Part(number, count))
        merged = merge(cfg)
    assert merged is not None and merged["rejected"]["count"] == 24
    assert contents(tmp_path / "out") == contents(whole)
    assert not list(tmp_path.glob(".*"))


def test_a_prepare_goes_on_with_what_parts_have_begun(
    rows: Path, tiny_model: Path, whole: Path, tmp_path: Path
) -> None:
    cfg = config(rows, tiny_model, tmp_path / "out")
    prepare_part(cfg, Part(2, 3))
    scanned = {p: p.stat().st_mtime_ns for p in (tmp_path / ".out.partial/scan").iterdir()}
    assert len(scanned) == 2
    seen = {}

    def watch(line: str) -> None:
        seen[line] = True

    prepare(cfg, say=watch)
    assert not seen
    assert contents(tmp_path / "out") == contents(whole)


def test_a_merge_names_what_is_missing(rows: Path, tiny_model: Path, tmp_path: Path) -> None:
    cfg = config(rows, tiny_model, tmp_path / "out")
    with pytest.raises(ConfigError, match="has no parts to merge; run --part 1/n to n/n"):
        merge(cfg)
    prepare_part(cfg, Part(1, 2))
    with pytest.raises(ConfigError, match="scan is not complete: 3 of 6 units are missing, the fi"):
        merge(cfg)
    prepare_part(cfg, Part(2, 2))
    assert merge(cfg) is None
    prepare_part(cfg, Part(1, 2))
    with pytest.raises(ConfigError, match="write is not complete: .* units are missing, the first"):
        merge(cfg)


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/", "-1/2", "1/0"])
def test_a_part_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--part must be i/n with i from 1 to n, got "):
        Part.parse(text)


def test_two_at_once_are_refused_and_parts_are_not(
    rows: Path, tiny_model: Path, tmp_path: Path
) -> None:
    cfg = config(rows, tiny_model, tmp_path / "out")
    prepare_part(cfg, Part(1, 2))
    lock = tmp_path / ".out.partial/lock"
    with locked(lock, is_shared=True):
        prepare_part(cfg, Part(2, 2))
        with pytest.raises(ConfigError, match=rf"is in use by process {os.getpid()} on .*; wait"):
            prepare(cfg)
        with pytest.raises(ConfigError, match="is in use by"):
            merge(cfg)
    with locked(lock, is_shared=False), pytest.raises(ConfigError, match="is in use by"):
        prepare_part(cfg, Part(2, 2))
    prepare(cfg)


def test_one_whose_lock_was_purged_and_taken_leaves_the_folder_to_the_other(
    rows: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, lock = config(rows, tiny_model, tmp_path / "out"), tmp_path / ".out.partial/lock"
    others = []

    def purge_and_take(*arguments: Any) -> Any:
        lock.unlink()
        others.append(take(lock))
        return scan_chunk(*arguments)

    monkeypatch.setattr(dataset, "scan_chunk", purge_and_take)
    with pytest.raises(ConfigError, match="lock was removed, and .* is in use by process"):
        prepare(cfg)
    monkeypatch.undo()
    assert len(others) == 1
    others[0].close()
    prepare(cfg)


def test_work_on_another_recipe_is_started_afresh_and_never_mixed(
    rows: Path, tiny_model: Path, tmp_path: Path
) -> None:
    prepare_part(config(rows, tiny_model, tmp_path / "out", num_crops=1), Part(1, 2))
    cfg = config(rows, tiny_model, tmp_path / "out")
    with pytest.raises(ConfigError, match="unfinished work on another recipe: num_crops differ; r"):
        prepare_part(cfg, Part(1, 2))
    said: list[str] = []
    prepare(cfg, said.append)
    assert said == [
        f"{tmp_path}/.out.partial held work on another recipe (num_crops): started afresh"
    ]
    assert max(Dataset(tmp_path / "out", "train").views) == 5


def test_files_that_nothing_lists_are_not_published(
    rows: Path, tiny_model: Path, whole: Path, tmp_path: Path
) -> None:
    """Of work whose recipe is not there any more, of an earlier plan, of a killed process."""
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "manifest.json").write_text('{"format_version": 2, "recipe": {"num_crops": 9}}')
    (partial / "train-99998.arrow").touch()
    cfg = config(rows, tiny_model, tmp_path / "out")
    prepare_part(cfg, Part(1, 2))
    (partial / "train-99999.arrow").touch()
    (partial / ".train-00000.arrow.1.tmp").touch()
    prepare(cfg)
    assert contents(tmp_path / "out") == contents(whole)


def test_after_too_many_rejections_mended_rows_are_looked_at_again(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Also one whose header is whole, so that only its shard's writer sees the damage."""
    whole = write_picture(tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    names = ["a.png", "b.png", "c.png"]
    lines = [turn("<|image_1|>?", "yes", id=n, images=[n]) for n in names * 100]
    source = write_jsonl(tmp_path / "rows.jsonl", lines)
    cfg = recipe(tiny_model, tmp_path / "out", {"path": str(source)}, max_rejected=0.3)
    for mended in ("c.png", "b.png"):
        with pytest.raises(ConfigError, match="of 300 rows of .* max_rejected allows a share"):
            prepare(cfg)
        write_picture(tmp_path / mended, width=90, seed=1)
    manifest = prepare(cfg)
    assert manifest["rejected"]["count"] == 0
    assert manifest["splits"]["train"]["samples"] == 300


def test_a_raised_limit_goes_on_without_a_fresh_start(
    rows: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Without a look at the pictures' likeness, damage is first seen where shards are written."""
    out, split = tmp_path / "out", {"validation": 0.1, "near_duplicates": "ignore"}
    with pytest.raises(ConfigError, match="24 of 1300 rows"):
        prepare(config(rows, tiny_model, out, max_rejected=0.015, split=split))
    partial = tmp_path / ".out.partial"
    kept = {path.stem for path in partial.glob("written/*.json")}
    assert kept  # those in which no row was rejected
    before = written(partial, kept)
    said: list[str] = []
    manifest = prepare(config(rows, tiny_model, out, max_rejected=0.02, split=split), said.append)
    assert manifest["rejected"]["count"] == 24 and not said
    assert written(out, kept) == before


def test_a_picture_that_changes_between_the_passes_is_rejected(
    rows: Path, tiny_model: Path, tmp_path: Path
) -> None:
    pictures = [write_picture(tmp_path / f"{k}.png", seed=k).name for k in range(9)]
    lines = [turn("<|image_1|>?", "yes", images=[name]) for name in pictures]
    source = write_jsonl(tmp_path / "rows.jsonl", lines)
    cfg = recipe(tiny_model, tmp_path / "out", {"path": str(source)}, max_rejected=0.2)
    prepare_part(cfg, Part())
    assert merge(cfg) is None
    write_picture(tmp_path / "4.png", width=20, height=200)
    manifest = prepare(cfg)
    assert manifest["rejected"]["by_reason"] == {"an image changed while rows were prepared": 1}
    assert manifest["splits"]["train"]["samples"] == 8


# Kills


def test_a_kill_before_the_folder_has_its_name_costs_nothing(
    rows: Path, tiny_model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(rows, tiny_model, tmp_path / "out")

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "publish", die)
        with pytest.raises(KeyboardInterrupt):
            prepare(cfg)
    kept = {path.stem for path in (tmp_path / ".out.partial").glob("*.arrow")}
    before = written(tmp_path / ".out.partial", kept)
    assert prepare(cfg) == json.loads((whole / "manifest.json").read_text())
    assert written(tmp_path / "out", kept) == before
    assert contents(tmp_path / "out") == contents(whole)


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def command(recipe_file: Path, *values: str) -> list[Any]:
    return [sys.executable, LAUNCH / "prepare.py", recipe_file, *values]


def test_killed_at_any_moment_and_started_again_it_ends_with_the_same_bytes(
    rows: Path, tiny_model: Path, whole: Path, tmp_path: Path
) -> None:
    """SIGKILL of the command alone: its workers must end by themselves."""
    recipe_file = tmp_path / "r.yaml"
    recipe_file.write_text(
        f"source: {{path: {rows}/rows.jsonl}}\nmodel: {tiny_model}\nout: {tmp_path}/out\n"
        "split: {validation: 0.1}\nshard_bytes: 400000\nworkers: 2\n"
    )
    partial = tmp_path / ".out.partial"
    moments = ["plan.json", "scan/*.arrow", "train-*.arrow", "written/*.json"]
    for moment in moments:
        process = start(*command(recipe_file), cwd=tmp_path)
        family: list[psutil.Process] = []
        while process.poll() is None and not list(partial.glob(moment)):
            time.sleep(0.001)
        if process.poll() is None:
            family = children(process)
            process.send_signal(signal.SIGKILL)
        process.communicate()
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive
    done = run(*command(recipe_file), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(whole)
    assert not list(tmp_path.glob(".*"))


def test_a_killed_worker_ends_the_command_with_advice(
    rows: Path, tiny_model: Path, tmp_path: Path
) -> None:
    recipe_file = tmp_path / "r.yaml"
    recipe_file.write_text(
        f"source: {{path: {rows}/rows.jsonl}}\nmodel: {tiny_model}\nout: {tmp_path}/out\n"
        "shard_bytes: 100000\nworkers: 2\n"
    )
    process = start(*command(recipe_file), cwd=tmp_path)
    while process.poll() is None and not list((tmp_path / ".out.partial").glob("scan/*.arrow")):
        time.sleep(0.001)
    workers = sorted(children(process), key=lambda p: p.memory_info().rss)
    workers[-1].kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "one of 2 worker processes was killed, perhaps for want of memory; start again" in err


MEASURE = """
import resource, sys
from pathlib import Path
from phi3v.config import DatasetConfig, load_recipe
from phi3v.prepare import prepare
prepare(load_recipe(DatasetConfig, Path(sys.argv[1]), sys.argv[2:]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_dataset(tiny_model: Path, tmp_path: Path) -> None:
    """The table of all rows grows; canvases, 0.34 MB a row and 0.4 GB more in all, may not."""
    random_pixels = np.random.default_rng(0).integers(0, 256, (448, 448, 3), dtype=np.uint8)
    Image.fromarray(random_pixels).save(tmp_path / "a.jpg")
    peaks = []
    for count in (250, 1500):
        lines = [turn("<|image_1|>?", f"answer {k}", images=["a.jpg"]) for k in range(count)]
        write_jsonl(tmp_path / f"{count}.jsonl", lines)
        (tmp_path / "r.yaml").write_text(
            f"source: {{path: {count}.jsonl}}\nmodel: {tiny_model}\nout: out{count}\n"
            "num_crops: 36\nshard_bytes: 16000000\nworkers: 1\nsplit: {validation: 0.1}\n"
        )
        done = run(sys.executable, "-c", MEASURE, "r.yaml", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
        assert (
            sum(path.stat().st_size for path in (tmp_path / f"out{count}").iterdir())
            > 300_000 * count
        )
    assert peaks[1] < peaks[0] + 40, peaks
