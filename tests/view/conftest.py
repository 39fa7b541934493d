"""A dataset of everything that the page has to show, and the page about it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from phi3v.prepare import prepare
from phi3v.view import Wishes, write_view
from tests.page import Page
from tests.tiny import recipe, turn, write_jsonl

BLUE = (30, 60, 200)
HOSTILE = "<script>alert('&')</script>"
View = Callable[..., Page]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """21 samples: one picture, two, or none; 2 x 2, 2 x 1 and 1 x 4 crops; 4 rows rejected."""
    folder = tmp_path_factory.mktemp("view")
    sizes = {"square": (90, 90), "tall": (40, 80), "wide": (160, 40), "flat": (90, 60)}
    for name, size in sizes.items():
        Image.new("RGB", size, BLUE).save(folder / f"{name}.png")
    rows: list[dict[str, Any]] = []
    for number in range(5):
        many = "a blue picture. " * (number + 1)
        rows += [
            turn("<|image_1|>\nWhat?", many, images=["square.png"], id=f"square-{number}"),
            turn("<|image_1|> <|image_2|>\nBoth?", "Blue.", images=["tall.png", "wide.png"]),
            turn(f"No picture, {HOSTILE}?", f"None: {HOSTILE}", id=f"<i>{number}</i>"),
            turn("<|image_1|>\nTall?", "Yes.", images=["tall.png"], id=f"tall-{number}"),
        ]
    rows.append(turn("<|image_1|>\nFlat?", "Yes.", images=["flat.png"], id="padded"))
    rows += [turn("<|image_1|>\nGone?", "x", images=[f"<b>{n}.png"], id="gone") for n in range(3)]
    source = {"path": str(write_jsonl(folder / "rows.jsonl", [*rows, turn("Hi", "")]))}
    split = {"validation": 0.2, "near_duplicates": "ignore"}
    prepare(recipe(tiny_model, folder / "shards", source, split=split, max_rejected=0.2))
    return folder / "shards"


@pytest.fixture
def view(tmp_path: Path, shards: Path) -> View:
    """Writes the page about `shards`, or another folder, to view.html."""

    def write(folder: Path = shards, **wishes: Any) -> Page:
        out = tmp_path / "view.html"
        write_view(folder, out, Wishes(**wishes))
        return Page(out.read_text(encoding="utf-8"))

    return write
