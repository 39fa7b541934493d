"""The hostile zoo: rows that no dataset should hold, and what each of them must become.

    zoo = make_zoo(folder, tokens=["<|end|>", ...], rows=10_000)
    zoo.sources            sections of a recipe: JSONL, JSON, CSV and Parquet files in `folder`
    zoo.animals[path][7]   row 7 of one of those files, and what must become of it

The same arguments give the same rows. Pictures are made in pictures.py and bombs.py, the ways to
name them in references.py, chats in animals.py.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.prepare.animals import (
    HALF,
    IDS,
    NO_TAG,
    TAG,
    TAGS,
    TURNS,
    Animal,
    chat,
    keys_and_tags,
    lines,
    no_chats,
    orders_of_images,
    orders_of_turns,
    shown,
    texts,
)
from tests.prepare.bombs import bombs
from tests.prepare.pictures import GOOD, damages, fate_of, pictures
from tests.prepare.references import Reference, references
from tests.tiny import turn

MAX_TOKENS = 4000
REFUSED = "image "  # takes too much to decode, or cannot be read: as its decoder puts it
QUESTION = f"{TAG}\nWhat?"
HUMAN, GPT = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}
NAN, INF = float("nan"), float("inf")


@dataclass
class Zoo:
    """The animals of each file, and the sections of a recipe that read them."""

    folder: Path
    animals: dict[str, list[Animal]] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    kept: int = 0

    def add(self, name: str, animals: list[Animal], **section: Any) -> Path:
        path = self.folder / name
        self.animals[str(path)] = animals
        self.sources.append({"path": str(path), "image_root": str(self.folder), **section})
        return path

    def keep(self, data: bytes, fate: str = GOOD) -> Reference:
        """Write a picture into a file; what it is called does not matter."""
        name = f"kept/{self.kept}.jpg"
        self.kept += 1
        (self.folder / name).write_bytes(data)
        return Reference(name, fate, data)


def make_zoo(folder: Path, tokens: Sequence[str], rows: int, seed: int = 0) -> Zoo:
    """Write the files of a zoo of so many rows; `tokens` are the added ones of a tokenizer."""
    random = Random(seed)
    zoo = Zoo(folder)
    (folder / "kept").mkdir()
    images = [zoo.keep(data, fate) for data, fate in pictures(random)]
    named = [*images, *references(folder, images[0])]
    _write_llava(zoo, named)
    _write_prices(zoo)
    _write_products(zoo, images)
    _write_tables(zoo, images)
    chats = [*texts(tokens), *orders_of_turns(), *no_chats(), *orders_of_images(*images[:2])]
    chats += keys_and_tags(images[0])
    identified = zip(named, cycle(IDS), strict=False)
    chats += [*lines(random), *(_in_chat(image, id=name) for image, name in identified)]
    chats += [_in_chat(zoo.keep(data, REFUSED)) for _, data in bombs()]
    left = rows - 1 - len(chats) - sum(map(len, zoo.animals.values()))
    damaged = (zoo.keep(data, fate_of(data)) for data in islice(damages(random), left))
    chats += [_in_chat(image) for image in damaged]
    random.shuffle(chats)
    _write_chats(zoo, [_long_chat(), *chats])  # the first row tells what the others are
    return zoo


def _in_chat(image: Reference, **values: Any) -> Animal:
    return shown(image, turn(QUESTION, "This.", images=[image.value], **values))


def _long_chat() -> Animal:
    turns = [(role, f"{role} {k}") for k in range(40) for role in ("user", "assistant")]
    return Animal(chat(*turns), answers=tuple(text for role, text in turns if role == "assistant"))


def _write_chats(zoo: Zoo, animals: list[Animal]) -> None:
    rows = (animal.row for animal in animals)
    written = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    zoo.add("chats.jsonl", animals).write_bytes(b"\n".join(written))


def _write_llava(zoo: Zoo, images: Sequence[Reference]) -> None:
    """Conversations of human and gpt, with every image that a text can name."""
    named = [i for i in images if isinstance(i.value, str) and i.value.strip()]
    animals = [shown(i, {"conversations": [HUMAN, GPT], "image": i.value}) for i in named]
    speaker, text = "speaker is not one of ", "a turn has no 'from' and 'value' text"
    no_turns = "'conversations' is not a list of turns"
    bad: list[tuple[Any, str]] = [
        ([HUMAN, GPT], TAGS),
        ([GPT, HUMAN], TURNS),
        ([HUMAN, {"from": "bing", "value": "x"}], speaker),
        ([HUMAN, {"from": ["gpt"], "value": "x"}], speaker),
        ([{"from": "\n" * 5000, "value": "x"}], speaker),
        ([{"value": "x"}], speaker),
        ([{"from": "human", "value": None}], text),
        ([None], text),
        ([{"from": "human", "value": f"<image>{TAG}"}, GPT], "image tags are of two kinds: "),
        ([{"from": "human", "value": "x"}, {"from": "gpt", "value": "<image>"}], NO_TAG),
        ([], no_turns),
        ("x", no_turns),
    ]
    animals += [Animal({"conversations": turns}, fate) for turns, fate in bad]
    for row in (None, 7, "x", [], [1], False, -1.5):
        kind = type(row).__name__
        animals.append(Animal(row, f"the row is a {kind}, not an object with named fields"))
    path = zoo.add("llava.json", animals, format="llava")
    path.write_text(json.dumps([animal.row for animal in animals], indent=1))


def _write_prices(zoo: Zoo) -> None:
    """Columns of a JSON list, of every type that JSON knows and two that it does not."""
    fates: dict[str, list[Any]] = {
        GOOD: [1, 0, -1.5, True, False, "7", 10**300, 1e-300, "NaN", "{title}"],
        "column 'price' is empty": [NAN, None, "", " \n", []],
        "column 'price' is not finite: ": [INF, -INF],
        "column 'price' is no text: ": [[1], {}, {"a": 1}],
        NO_TAG: [TAG],
        HALF: ["\ud83d"],
    }
    animals = [
        Animal({"title": "Hat {price}", "price": value}, fate, answers=(str(value),))
        for fate, values in fates.items()
        for value in values
    ]
    animals.append(Animal({"title": "Hat"}, "column 'price' is empty"))
    path = zoo.add("prices.json", animals, user="How much is {title}?", assistant="{price}")
    path.write_text(json.dumps([animal.row for animal in animals]))


def _write_products(zoo: Zoo, images: Sequence[Reference]) -> None:
    """A CSV file; what is written in it is text, nan and inf too."""
    animals = [shown(image, [f"Hat {k}", image.value, "1"]) for k, image in enumerate(images)]
    kept = images[0].value
    for title in ("nan", "inf", "NULL", 'a "b"', "a\nb", "a,b", "\u202e", "=1+1", "x\r\ny", "a\0b"):
        animals.append(shown(images[0], [title, kept, "1"]))
    animals.append(Animal(["", kept, "1"], "column 'title' is empty"))
    animals.append(Animal(["Hat", "", "1"], "column 'picture' is empty"))
    animals.append(Animal(["Hat", kept], "the row has fewer fields than the header: "))
    animals.append(Animal(["Hat", kept, "1", "2"], "the row has more fields than the header: "))
    animals.append(Animal(b'"Hat" x,y,1\r\n', "the row cannot be read as CSV: "))
    section = {"user": f"{TAG} {{title}}", "assistant": "This.", "images": ["picture"]}
    path = zoo.add("products.csv", animals, **section)
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["title", "picture", "price"])
        for row in (animal.row for animal in animals):
            file.write(row.decode()) if isinstance(row, bytes) else writer.writerow(row)


def _write_tables(zoo: Zoo, images: Sequence[Reference]) -> None:
    """A Parquet file with images as bytes, prices that are no numbers, text that is not UTF-8."""
    animals = [shown(i, ("Hat", 1.5, {"bytes": i.data, "path": None})) for i in images if i.data]
    image = {"bytes": images[0].data, "path": "/nowhere/x.png"}
    animals.append(shown(images[0], ("Hat", 1.5, image)))
    bad: list[tuple[Any, Any, Any, str]] = [
        *(("Hat", price, image, "column 'price' is empty") for price in (NAN, None)),
        *(("Hat", price, image, "column 'price' is not finite: ") for price in (INF, -INF)),
        *((title, 1.5, image, "column 'title' is empty") for title in (None, "", "\u3000")),
        ("Hat", 1.5, None, "column 'image' is empty"),
        ("Hat", 1.5, {"bytes": None, "path": None}, "column 'image' is empty"),
        ("Hat", 1.5, {"bytes": b"", "path": ""}, "column 'image' is empty"),
        (b"H\xfct", 1.5, image, "the row holds a value that cannot be read: "),
    ]
    animals += [Animal(row, fate) for *row, fate in bad]
    titles, prices, pictured = zip(*(animal.row for animal in animals), strict=True)
    encoded = [title.encode() if isinstance(title, str) else title for title in titles]
    columns = {
        "title": pa.array(encoded, pa.binary()).view(pa.string()),
        "price": pa.array(prices, pa.float64()),
        "image": pa.array(pictured, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    }
    section = {"user": f"{TAG} {{title}} {{price}}", "assistant": "This.", "images": ["image"]}
    pq.write_table(pa.table(columns), zoo.add("tables.parquet", animals, **section))
