"""What docs/data.md shows works as it is written there."""

import json
import re
from pathlib import Path

import pytest

from phi3v.data import Dataset
from phi3v.data.format import SCHEMA
from phi3v.processing import Phi3VProcessor
from tests.commands import ROOT
from tests.prepare.test_command import call
from tests.prepare.test_rejected import BAD_ROWS
from tests.tiny import write_picture

TEXT = (ROOT / "docs/data.md").read_text(encoding="utf-8")
SLURM = "slurm/prepare.sh 64 shop.yaml"  # run by tests/slurm/test_prepare.py


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", TEXT, flags=re.DOTALL)


def prepared(folder: Path) -> list[str]:
    return [sample.meta["reference"] for sample in Dataset(folder, "train")]


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    """The files that the page names, beside a model."""
    names = re.findall(r"^`(\w+\.\w+)`[:,]", TEXT, flags=re.MULTILINE)
    assert names == ["shop.csv", "shop.yaml", "chats.jsonl", "chats.yaml"]
    (shop_csv,), (shop, chats, *_), (jsonl,) = blocks("csv"), blocks("yaml"), blocks("json")
    for name, text in zip(names, (shop_csv, shop, jsonl, chats), strict=True):
        (tmp_path / name).write_text(text, encoding="utf-8")
    for number in (1, 2, 3):
        write_picture(tmp_path / f"images/a{number}.png", seed=number)
    lines = jsonl.splitlines()
    (tmp_path / "chats.jsonl").write_text("\n".join(lines[:3]), encoding="utf-8")
    (tmp_path / "llava.json").write_text(f"[{lines[3]}]", encoding="utf-8")
    (tmp_path / "models").mkdir()
    (tmp_path / "models/tiny").symlink_to(tiny_model)
    return tmp_path


def test_every_command_and_every_program_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    lines = "".join(blocks("bash")).splitlines()
    commands = [line.strip() for line in lines if line.strip()]
    assert len(commands) == 14
    for command in commands:
        if command != SLURM:
            program, script, *arguments = command.split()
            assert program == "python"
            call(monkeypatch, *arguments, script=ROOT / script)
    assert {path.name for path in folder.glob("*.html")} == {"chats.html", "try.html"}
    assert prepared(folder / "shards/parts") == prepared(folder / "shards/shop")
    shop = Dataset(folder / "shards/shop", "train")
    assert [s.meta["reference"] for s in shop] == ["Red cap, 12 EUR", "Blue cap, wide, 15 EUR"]
    assert shop.manifest["rejected"]["by_reason"] == {"column 'price' is empty": 1}
    chats = [*Dataset(folder / "shards/chats", "train")]
    chats += Dataset(folder / "shards/chats", "validation")
    found = sorted((s.id, len(s.images)) for s in chats)
    assert found == [("r1", 1), ("r2", 2), ("r3", 0), ("r4", 1)]
    exec(compile("".join(blocks("python")), "docs/data.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1] == str(SCHEMA.names)


def test_every_key_of_the_manifest_is_explained(tiny_shards: Path) -> None:
    manifest = json.loads((tiny_shards / "manifest.json").read_text(encoding="utf-8"))
    for key in (*manifest, *manifest["splits"]["train"], *manifest["rejected"]):
        if key not in ("shards", "index", "count", "by_reason"):  # told in words
            assert f"`{key}`" in TEXT, key


def test_every_reason_is_explained() -> None:
    table = TEXT.partition("## What is rejected")[2]
    for _, reason in BAD_ROWS:
        kind = reason.split(":")[0]
        for part in re.split(r" of type \w+| a str| a list", kind):
            assert part.strip(", ") in table, reason


def test_the_sizes_of_the_page_are_those_of_the_published_crops(tiny_model: Path) -> None:
    crop = 3 * 336 * 336
    assert round(crop / 1e6, 2) == 0.34
    assert (round(4 * crop / 1e6, 1), round(16 * crop / 1e6, 1)) == (1.4, 5.4)
    assert round(100_000 * 4 * crop / 1e9) == 135
    assert Phi3VProcessor(None, 4, (), ()).crop_size == 336
