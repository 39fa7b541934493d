"""Small local stand-ins for the datasets of the shipped recipes: the same columns and types.

standin = make_nlvr2(folder)
standin.overrides    # ["source.path=..."]: where the rows are, and nothing about what they mean
standin.chats        # what is to become of each row
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from tests.prepare.hosts import Host, jpeg

ROWS = 12
TEXT, NUMBER = datasets.Value("string"), datasets.Value("int64")


@dataclass(frozen=True)
class Chat:
    """What a row is to become: turns of question and answer, and its pictures as encoded bytes.

    references  all answers that are right, where the dataset names them
    """

    turns: tuple[tuple[str, str], ...]
    pictures: tuple[bytes, ...]
    references: list[str] | None = None


@dataclass(frozen=True)
class StandIn:
    """Overrides that put a dataset recipe on local rows, and what is to become of each row."""

    overrides: list[str]
    chats: list[Chat]


def save_split(folder: Path, rows: Sequence[dict[str, Any]], **features: Any) -> str:
    """Save a folder as `datasets` does, with two splits, of which the recipe wants train."""
    table = datasets.Dataset.from_list(list(rows), features=datasets.Features(features))
    both = datasets.DatasetDict(train=table, validation=table.select(range(2)))
    both.save_to_disk(str(folder / "saved"))
    return f"source.path={folder / 'saved'}"


def make_burberry(folder: Path, host: Host) -> StandIn:
    """Products whose pictures a host gives."""
    rows: list[dict[str, Any]] = [
        {
            "website_name": "Burberry",
            "category3_code": "SHIRTS",
            "product_code": f"8012{number:04}",
            "title": f"Check Cotton Shirt, No. {number}",
            "imageurl": host.url(f"/numbered/{number}"),
            "full_price": 690.0 + number / 2,
        }
        for number in range(ROWS)
    ]
    features = {name: TEXT for name in rows[0]} | {"full_price": datasets.Value("float64")}
    answer = "Product: {title}, Category: {category3_code}, Full Price: {full_price}"
    question = "<|image_1|>\nWhat is shown in this image?"
    chats = [
        Chat(((question, answer.format(**row)),), (jpeg(seed=number),))
        for number, row in enumerate(rows)
    ]
    return StandIn([save_split(folder, rows, **features), "fetch.allow_private=true"], chats)


def make_docvqa(folder: Path) -> StandIn:
    """Questions about pages, each with several answers, the first of which is taught."""
    rows: list[dict[str, Any]] = [
        {
            "questionId": 337 + number,
            "question": f"What is the sum on page {number}?",
            "question_types": ["table/list"],
            "image": {"bytes": jpeg(60, 80, number), "path": f"page{number}.png"},
            "docId": 279,
            "ucsf_document_id": f"xnbl00{number // 2}",
            "ucsf_document_page_no": str(number),
            "answers": [f"${number}.28", f"{number}.28"],
        }
        for number in range(ROWS)
    ]
    features = {name: TEXT for name in rows[0]} | {
        "questionId": NUMBER,
        "question_types": datasets.List(TEXT),
        "image": datasets.Image(),
        "docId": NUMBER,
        "answers": datasets.List(TEXT),
    }
    chats = []
    for row in rows:
        question = f"<|image_1|>\n{row['question']}\nAnswer briefly."
        answers = row["answers"]
        chats.append(Chat(((question, answers[0]),), (row["image"]["bytes"],), answers))
    return StandIn([save_split(folder, rows, **features)], chats)


def make_nlvr2(folder: Path) -> StandIn:
    """Sentences about two photographs."""
    rows: list[dict[str, Any]] = [
        {
            "identifier": f"train-{number}-0-0",
            "sentence": f"One image shows {number} dogs, the other none.",
            "label": ("True", "False")[number % 2],
            "image0": {"bytes": jpeg(80, 60, 2 * number), "path": f"train-{number}-img0.png"},
            "image1": {"bytes": jpeg(60, 60, 2 * number + 1), "path": f"train-{number}-img1.png"},
        }
        for number in range(ROWS)
    ]
    features = {name: TEXT for name in rows[0]} | {
        "image0": datasets.Image(),
        "image1": datasets.Image(),
    }
    asked = "Is it true of the two images? Answer True or False."
    chats = []
    for row in rows:
        question = f"<|image_1|>\n<|image_2|>\n{row['sentence']}\n{asked}"
        pictures = (row["image0"]["bytes"], row["image1"]["bytes"])
        chats.append(Chat(((question, row["label"]),), pictures))
    return StandIn([save_split(folder, rows, **features)], chats)


def make_llava(folder: Path) -> StandIn:
    """A JSON file of chats of several turns, three about each photograph."""
    photographs = folder / "train2017"
    photographs.mkdir()
    rows, chats = [], []
    for number in range(ROWS):
        name = f"{number // 3:012}"
        picture = jpeg(seed=number // 3)
        (photographs / f"{name}.jpg").write_bytes(picture)
        tags = "What is it?\n<image>" if number % 2 else "<image>\nWhat is it?"
        turns = [(tags, f"Picture {number}."), ("Sure?", "Yes."), ("Why?", "I see it.")]
        said = [text for turn in turns[: 1 + number % 3] for text in turn]
        conversations = [
            {"from": ("human", "gpt")[position % 2], "value": text}
            for position, text in enumerate(said)
        ]
        rows.append({"id": name, "image": f"{name}.jpg", "conversations": conversations})
        said[0] = said[0].replace("<image>", "<|image_1|>")
        chats.append(Chat(tuple(zip(said[::2], said[1::2], strict=True)), (picture,)))
    path = folder / "llava.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return StandIn([f"source.path={path}", f"source.image_root={photographs}"], chats)


MAKERS: dict[str, Callable[[Path, Host], StandIn]] = {
    "burberry": make_burberry,
    "docvqa": lambda folder, _: make_docvqa(folder),
    "nlvr2": lambda folder, _: make_nlvr2(folder),
    "llava": lambda folder, _: make_llava(folder),
}


def decode(picture: bytes) -> Image.Image:
    return Image.open(BytesIO(picture)).convert("RGB")
