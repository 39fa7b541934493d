"""What rows and folders of data may name: files in folders that the recipe names, and no byte of
others in any message. A disk that has hiccups costs no row."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from phi3v import reading
from phi3v.config import DatasetConfig
from phi3v.config.dataset import SourceSection
from phi3v.data import Dataset
from phi3v.errors import ConfigError, MachineError
from phi3v.prepare import prepare, text
from phi3v.prepare.recipe import resolved_recipe
from phi3v.prepare.sources import check_source, open_source
from tests.tiny import recipe, turn, write_jsonl, write_picture

IMAGE = "<|image_1|>"
SECRET = "hf_SECRETsecretSECRET"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(reading, "PAUSES", (0.0, 0.0))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """What belongs to the user and to no dataset."""
    home = tmp_path / "home"
    write_picture(home / "passport.png")
    (home / "token").write_text(SECRET)
    chat = turn("Who?", SECRET, id="private")
    write_jsonl(home / "chats.jsonl", [chat])
    return home


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of somebody else."""
    write_picture(tmp_path / "ds/a.png")
    return tmp_path / "ds"


def row(name: str, image: Any) -> dict[str, Any]:
    return turn(f"{IMAGE} What?", "This.", id=name, images=[image])


def made(
    model: Path, out: Path, source: dict[str, Any], **values: Any
) -> tuple[list[str], dict[str, str]]:
    """The ids of the samples, and why the others were rejected."""
    prepare(recipe(model, out, source, max_rejected=1, **values))
    lines = (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    reasons = {entry["id"]: entry["reason"] for entry in map(json.loads, lines)}
    return [sample.id for sample in Dataset(out, "train")], reasons


def refusal(path: Path, **values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        open_source(SourceSection(path=str(path), **values), path.parent / "work")
    return str(caught.value)


# --- pictures ---


def test_rows_of_a_file_reach_its_folder_and_what_the_recipe_names(
    tmp_path: Path, folder: Path, home: Path, tiny_model: Path
) -> None:
    (folder / "link.png").symlink_to(home / "token")
    os.mkfifo(folder / "pipe.png")
    references = {
        "good": "a.png",
        "whole": str(folder / "a.png"),
        "passport": str(home / "passport.png"),
        "up": "../home/passport.png",
        "address": (home / "passport.png").as_uri(),
        "inner": {"bytes": None, "path": str(home / "passport.png")},
        "token": str(home / "token"),
        "link": "link.png",
        "near": str(home / "PASSPORT.PNG"),
        "environ": "/proc/self/environ",
        "root": "/proc/self/root" + str(home / "passport.png"),
        "pipe": "pipe.png",
    }
    rows = [row(name, reference) for name, reference in references.items()]
    source = {"path": str(write_jsonl(folder / "rows.jsonl", rows))}
    taken, reasons = made(tiny_model, tmp_path / "out", source)
    assert taken == ["good", "whole"]
    for name in ("passport", "up", "address", "inner", "token", "link", "root"):
        assert reasons[name].startswith("image lies outside of the folders that may be read: ")
        assert reasons[name].endswith("; to allow it, name its folder in source.image_folders")
    assert reasons["near"] == f"image does not exist: {home / 'PASSPORT.PNG'}"
    assert reasons["environ"].endswith("/proc/self/environ, it is the system's own")
    assert reasons["pipe"] == "image is not a plain file: pipe.png, it is a pipe"

    source["image_folders"] = [str(home)]
    taken, reasons = made(tiny_model, tmp_path / "more", source)
    assert taken == ["good", "whole", "passport", "up", "address", "inner", "root"]
    assert reasons["token"].endswith("cannot identify image file, it is a text")
    assert not [said for said in reasons.values() if SECRET[:6] in said or "b'" in said]


@pytest.mark.parametrize(
    "start", [b"", b"P1 ", b"P6\n", b"P5 1 1 ", b"BM", b"II*\0", b"\x89PNG\r\n\x1a\n", b"GIF89a"]
)
def test_no_byte_of_a_file_that_is_no_picture_is_quoted(
    folder: Path, tmp_path: Path, tiny_model: Path, start: bytes
) -> None:
    secret = b"71829364" * 8  # as digits, for a number may be told as well as a text
    (folder / "b.png").write_bytes(start + secret)
    path = write_jsonl(folder / "rows.jsonl", [row("a", "a.png"), row("b", "b.png")])
    _, reasons = made(tiny_model, tmp_path / "out", {"path": str(path)})
    assert reasons["b"].startswith("image cannot be read: b.png, ")
    assert not any(character.isdigit() for character in reasons["b"])


def test_a_size_is_limited_by_the_budget_of_a_row(
    folder: Path, tmp_path: Path, tiny_model: Path
) -> None:
    (folder / "big.bmp").write_bytes(b"BM" + bytes(60))
    os.truncate(folder / "big.bmp", 40 << 30)
    path = write_jsonl(folder / "rows.jsonl", [row("a", "a.png"), row("b", "big.bmp")])
    _, reasons = made(tiny_model, tmp_path / "out", {"path": str(path)}, max_row_bytes=1 << 22)
    assert reasons["b"] == (
        "image has too many bytes: 42,949,672,960, big.bmp; max_row_bytes is 4,194,304"
    )


def test_rows_of_a_folder_reach_that_folder(
    folder: Path, home: Path, tmp_path: Path, tiny_model: Path
) -> None:
    rows = [row("good", "ds/a.png"), row("beside", "home/passport.png")]
    write_jsonl(folder / "rows.jsonl", rows)
    taken, reasons = made(tiny_model, tmp_path / "out", {"path": str(folder)})
    assert taken == ["good"]
    assert reasons["beside"].startswith("image lies outside of the folders")


def test_a_root_that_is_named_is_what_counts(
    folder: Path, home: Path, tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "root").symlink_to(folder)
    rows = [row("good", "a.png"), row("whole", str(folder / "a.png")), row("own", str(home))]
    path = write_jsonl(home / "rows.jsonl", rows)
    source = {"path": str(path), "image_root": str(tmp_path / "root")}
    taken, reasons = made(tiny_model, tmp_path / "out", source)
    assert taken == ["good", "whole"] and list(reasons) == ["own"]


@pytest.mark.parametrize("key", ["image_root", "image_folders"])
def test_a_folder_of_pictures_that_is_none_is_refused_before_a_row_is_read(
    folder: Path, tmp_path: Path, tiny_model: Path, key: str
) -> None:
    source = {"path": str(write_jsonl(folder / "rows.jsonl", [row("good", "a.png")]))}
    for name, what in (("pcitures", "does not exist"), ("a.png", "is a file, not a folder")):
        place = str(folder / name)
        named = {key: place if key == "image_root" else [place]}
        with pytest.raises(ConfigError, match=f"^source.{key} {place} {what}; name the folder"):
            made(tiny_model, tmp_path / "out", source | named)


def test_a_folder_of_pictures_may_hold_links_that_stay_in_it(
    folder: Path, home: Path, tmp_path: Path, tiny_model: Path
) -> None:
    for name in ("cat", "dog"):
        write_picture(folder / f"kept/{name}.png", seed=len(name))
        (folder / name).mkdir()
        (folder / name / "0.png").symlink_to(f"../kept/{name}.png")
    (folder / "a.png").unlink()
    (folder / "dog/1.png").symlink_to(home / "passport.png")
    source = {"path": str(folder), "user": IMAGE, "assistant": "A.", "images": ["image"]}
    taken, reasons = made(tiny_model, tmp_path / "out", source)
    assert len(taken) == 4
    (said,) = reasons.values()
    assert said.startswith("image lies outside") and str(home / "passport.png") in said


def test_a_snapshot_of_the_hubs_cache_is_a_source(tmp_path: Path, tiny_model: Path) -> None:
    cache = tmp_path / "hub/datasets--me--pets"
    files = cache / "snapshots/3f2a"
    (files / "images").mkdir(parents=True)
    write_picture(cache / "blobs/90c1.png").rename(cache / "blobs/90c1")
    write_jsonl(cache / "blobs/77aa", [row("a", "images/a.png")])
    (files / "images/a.png").symlink_to("../../../blobs/90c1")
    (files / "rows.jsonl").symlink_to("../../blobs/77aa")
    taken, _ = made(tiny_model, tmp_path / "file", {"path": str(files / "rows.jsonl")})
    assert taken == ["a"]
    root = {"path": str(files), "image_root": str(files)}
    taken, _ = made(tiny_model, tmp_path / "folder", root)
    assert taken == ["a"]


def test_a_recipe_without_further_folders_keeps_its_fingerprint(
    folder: Path, tmp_path: Path, tiny_model: Path
) -> None:
    source = {"path": str(write_jsonl(folder / "rows.jsonl", [row("a", "a.png")]))}
    one = resolved_recipe(recipe(tiny_model, tmp_path / "out", source))
    assert "image_folders" not in one["source"]
    source["image_folders"] = ["/"]  # type: ignore[assignment]
    other = resolved_recipe(recipe(tiny_model, tmp_path / "out", source))
    assert other["source"]["image_folders"] == ["/"]
    with pytest.raises(ConfigError, match="source.image_folders must not be empty, got ''"):
        SourceSection(path="a.jsonl", image_folders=("",))


# --- folders of data ---


def card(data_files: Any, **values: Any) -> str:
    config = {"config_name": "default", "data_files": data_files, **values}
    return f"---\n{json.dumps({'configs': [config]})}\n---\n# Data\n"


@pytest.mark.parametrize(
    "named",
    [
        "HOME/chats.jsonl",
        "../home/chats.jsonl",
        "data/../../home/*.jsonl",
        ["rows.jsonl", "HOME/chats.jsonl"],
        [{"split": "train", "path": "HOME/chats.jsonl"}],
        [{"split": "train", "path": ["rows.jsonl", "file://HOME/chats.jsonl"]}],
        "file:HOME/chats.jsonl",
        "local://HOME/chats.jsonl",
        "http://127.0.0.1:9/chats.jsonl",
        "hf://datasets/me/private/chats.jsonl",
        "zip://chats.jsonl::HOME/chats.zip",
        "~/chats.jsonl",
    ],
)
@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_what_a_folder_says_of_its_files_cannot_lead_out_of_it(
    folder: Path, home: Path, named: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset_builder", None)  # it would look there
    named = json.loads(json.dumps(named).replace("HOME", str(home)))
    write_jsonl(folder / "rows.jsonl", [turn("Hi", "Ho.")])
    text = card(named)
    (folder / name).write_text(text if name == "README.md" else text.split("---")[1])
    said = refusal(folder)
    assert said.startswith(f"source.path {folder}: {name} names '")
    assert said.endswith(
        "not in the folder; take it out, or name that file in source.path yourself"
    )


def test_a_part_of_a_folder_cannot_be_named_outside_of_it(folder: Path) -> None:
    (folder / "README.md").write_text(card("*.jsonl", data_dir="../home"))
    assert "README.md names '../home', which is not in the folder" in refusal(folder)


def test_what_a_folder_says_of_its_own_files_is_followed(folder: Path) -> None:
    write_jsonl(folder / "one.jsonl", [turn("Hi", "One.")])
    write_jsonl(folder / "sub/two.jsonl", []) if (folder / "sub").is_dir() else None
    write_jsonl(folder / "two.jsonl", [turn("Hi", "Two.")])
    (folder / "README.md").write_text(card([{"split": "train", "path": ["./two.jsonl"]}]))
    source = open_source(SourceSection(path=str(folder)), folder)
    (found,) = source.read(0, 9)
    assert found.values["messages"][1]["content"] == "Two."


@pytest.mark.parametrize(
    ("link", "target"),
    [("rows.jsonl", "home/chats.jsonl"), ("data", "home"), ("README.md", "home/token")],
)
def test_a_link_of_a_folder_cannot_lead_out_of_it(
    folder: Path, home: Path, tmp_path: Path, link: str, target: str
) -> None:
    (folder / link).symlink_to(tmp_path / target)
    assert refusal(folder) == (
        f"source.path {folder}: {link} leads out of the folder, to {tmp_path / target}; remove it, "
        "or name the folder it leads to in source.image_folders"
    )


def test_a_link_may_lead_to_a_folder_that_the_recipe_names(folder: Path, home: Path) -> None:
    (folder / "rows.jsonl").symlink_to(home / "chats.jsonl")
    section = SourceSection(path=str(folder), image_folders=(str(home),))
    (found,) = open_source(section, folder).read(0, 9)
    assert found.values["id"] == "private"


def test_a_pipe_for_a_folders_card_is_said(folder: Path) -> None:
    write_jsonl(folder / "rows.jsonl", [turn("Hi", "Ho.")])
    os.mkfifo(folder / ".huggingface.yaml")
    assert refusal(folder) == f"{folder / '.huggingface.yaml'} is a pipe, not a file; remove it"


def test_a_saved_dataset_cannot_list_files_of_another(folder: Path, tmp_path: Path) -> None:
    private = tmp_path / "private"
    for place, answer in ((folder, "Mine."), (private, SECRET)):
        rows = datasets.Dataset.from_list([turn("Hi", answer)])
        rows.save_to_disk(place / "saved")
    state = folder / "saved/state.json"
    for name in (str(next((private / "saved").glob("*.arrow"))), "../../private/saved/x.arrow"):
        listed = json.loads(state.read_text()) | {"_data_files": [{"filename": name}]}
        state.write_text(json.dumps(listed))
        assert f"state.json names '{name}', which is not in" in refusal(folder / "saved")
    (folder / "dataset_dict.json").write_text('{"splits": ["../private/saved"]}')
    said = refusal(folder, split="../private/saved")
    assert "dataset_dict.json names '../private/saved', which is not in the folder" in said


def test_files_of_a_hub_dataset_are_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Builder:
        """As the hub's own has it, of a dataset whose card names a file of this machine."""

        base_path = "hf://datasets/me/pets@3f2a"
        config = type("Config", (), {"data_files": {"train": [f"{base_path}/a.csv", "/x/b.csv"]}})

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: Builder())
    assert refusal(Path("me/pets")) == (
        "source.path me/pets has /x/b.csv read, which is not its own; name that file in "
        "source.path yourself"
    )


@pytest.mark.parametrize("is_linked", [False, True])
def test_a_source_that_is_a_pipe_or_a_device_is_said(tmp_path: Path, is_linked: bool) -> None:
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, kind in (("zero.csv", "a device"), ("pipe.jsonl", "a pipe")):
        path = tmp_path / name
        if is_linked:
            path = tmp_path / f"link.{name}"
            path.symlink_to(tmp_path / name)
        with pytest.raises(ConfigError) as caught:
            check_source(path)
        assert str(caught.value) == (
            f"source.path {path} is {kind}; write its rows into a file, and name it"
        )


# --- the machine ---


def failing(times: int, function: Callable[..., Any], end: str) -> Callable[..., Any]:
    """Something that opens a file, and fails so often for those whose path has this end."""
    left = [times]

    def call(path: Any, *arguments: Any, **named: Any) -> Any:
        if str(path).endswith(end) and left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return function(path, *arguments, **named)

    return call


@pytest.fixture
def cfg(folder: Path, tmp_path: Path, tiny_model: Path) -> DatasetConfig:
    write_picture(folder / "b.png", seed=1)
    path = write_jsonl(folder / "rows.jsonl", [row("a", "a.png"), row("b", "b.png")])
    return recipe(tiny_model, tmp_path / "out", {"path": str(path)})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("times", [2, 99])
def test_a_picture_that_the_machine_cannot_read_costs_no_row(
    cfg: DatasetConfig, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    out = Path(cfg.out)
    prepare(cfg)
    expected = contents(out)
    out.rename(out.with_name("before"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", failing(times, os.open, "b.png"))
        if times == 99:
            with pytest.raises(MachineError, match="b.png cannot be read .Stale file handle"):
                prepare(cfg)
            assert not out.exists()
    prepare(cfg)
    assert contents(out) == expected
    assert len(Dataset(out, "train")) == 2


def test_rows_that_the_machine_cannot_read_are_read_again(
    cfg: DatasetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = text.KINDS[".jsonl"][0]
    calls: list[bool] = []

    def hiccup(*arguments: Any) -> Any:
        calls.append(len(calls) in (0, 3, 5))  # the plan opens the file twice, each pass once
        if calls[-1]:
            raise OSError(errno.EIO, "Input/output error")
        return opened(*arguments)

    monkeypatch.setitem(text.KINDS, ".jsonl", (hiccup, text.KINDS[".jsonl"][1]))
    assert prepare(cfg)["rejected"]["count"] == 0
    assert calls == [True, False, False, True, False, True, False]
