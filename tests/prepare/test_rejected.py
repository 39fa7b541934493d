"""Nothing is lost silently: a row becomes a sample, or a line that says why it did not."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phi3v.data import Dataset
from phi3v.errors import ConfigError
from phi3v.prepare import prepare
from tests.prepare.bombs import scans
from tests.tiny import recipe, turn, write_jsonl, write_picture

IMAGE = "<|image_1|>"
MANY = "".join(f"<|image_{k}|>" for k in range(1, 130))
GOOD = turn(f"{IMAGE} What?", "This.", id="good", images=["good.png"])


def with_roles(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


def with_parts(*parts: Any, **values: Any) -> dict[str, Any]:
    return turn("", "A.", **values) | {
        "messages": [
            {"role": "user", "content": list(parts)},
            {"role": "assistant", "content": "A."},
        ]
    }


def with_turns(*turns: Any, **values: Any) -> dict[str, Any]:
    return {"conversations": list(turns), **values}


def with_image(reference: Any) -> dict[str, Any]:
    return turn(IMAGE, "A.", images=[reference])


# A row of messages, and the start of the reason for which it cannot be used.
BAD_ROWS: list[tuple[Any, str]] = [
    (with_image("torn.png"), "image cannot be read: torn.png, "),
    (with_image("text.png"), "image cannot be read: text.png, it is a web page, not the file"),
    (with_image("line.png"), "image is too narrow: 1x2000 pixels, nothing of the short side is"),
    (with_image("scans.jpg"), "image takes too much to decode: scans.jpg, a JPEG of more than 50"),
    (turn(MANY, "A.", images=["gone.png"] * 129), "too many images: 129, max_images is 128"),
    (turn("Hi " * 400_000, "A."), "too much text: 1,200,00"),
    (with_image("gone.png"), "image does not exist: ROOT/gone.png"),
    (with_image("."), "image does not exist: ROOT, which is a folder"),
    (with_image("a\0b"), "image does not exist: ROOT/a\\x00b"),
    (with_image("x" * 5000), f"image does not exist: ROOT/{'x' * 300}..."),
    (with_image("s3://shop/a.png"), "image is at an address of another kind than http(s): s3://"),
    (
        with_image("http://127.0.0.1:9/a.png"),
        "image URL leads to a private address: http://127.0.0",
    ),
    (with_image("data:image/png;base64,iVBO"), "image cannot be read: data:image/png;base64,iVBO"),
    (with_image(None), "image reference of type NoneType is no path or bytes"),
    (with_image({"path": None, "bytes": None}), "image reference of type NoneType is no path"),
    (with_image(7), "image reference of type int is no path or bytes"),
    (turn("Hi", ""), "an answer is empty: message 1"),
    (turn("Hi", " \n\t"), "an answer is empty: message 1"),
    (turn(IMAGE, "A."), "image tags do not name each image once: tags [1], 0 images"),
    (
        turn("Hi", "A.", images=["good.png"]),
        "image tags do not name each image once: tags none, 1 images; write <image>, or",
    ),
    (
        turn("<|image_2|>", "A.", images=["good.png"]),
        "image tags do not name each image once: tags",
    ),
    (turn(IMAGE + IMAGE, "A.", images=["good.png"]), "image tags do not name each image once: tag"),
    (turn(IMAGE, f"A {IMAGE}", images=["good.png"]), "an answer holds an image tag: message 1"),
    (turn(IMAGE, "A.", images="good.png"), "'images' is a str, not a list of images"),
    (turn("Hi", "A \ud83d"), "a text holds half of a surrogate pair: '\\ud83d'"),
    (turn("Hi", "A.", id="\udc00"), "a text holds half of a surrogate pair: '\\udc00'"),
    (with_roles("user", "user"), "turns are not user, assistant in alternation: user, user"),
    (with_roles("user"), "turns are not user, assistant in alternation: user"),
    (with_roles("system"), "turns are not user, assistant in alternation: system"),
    (with_roles("assistant", "user"), "turns are not user, assistant in alternation: assistant"),
    (with_roles("user", "system", "assistant"), "turns are not user, assistant in alternation: us"),
    (with_roles("human", "gpt"), "role is not one of system, user, assistant: human"),
    ({"messages": []}, "'messages' is not a list of messages"),
    ({"messages": "Hi"}, "'messages' is not a list of messages"),
    ({"text": "Hi"}, "'messages' is not a list of messages"),
    ({"messages": ["Hi"]}, "a message has no 'role' and 'content' text"),
    ({"messages": [{"role": "user", "content": None}]}, "a message has no 'role' and 'content' te"),
    (turn("Hi", "A.", references=["A.", 7]), "a reference is no text: a int"),
    (turn("Hi", "A.", references={"text": "A."}), "a reference is no text: a dict"),
    (turn("Hi", "A.", references=["A.", " "]), "a reference is empty: leave it out"),
    (turn("Hi", "A.", references=["\ud83d"]), "a text holds half of a surrogate pair: '\\ud83d'"),
    (turn(" ", "A."), "a question is empty: message 0"),
    (with_parts(), "a question is empty: message 0"),
    (with_parts({"type": "video"}), "a content part is neither text nor image: video"),
    (with_parts("Hi"), "a content part is neither text nor image: str"),
    (with_parts({"type": "text", "text": None}), "a content part is neither text nor image: text"),
    (with_parts({"type": "image"}), "an image part has no image: there is none left in 'images'"),
    (
        with_parts({"type": "image", "image": "good.png"}, images=["good.png"]),
        "'images' holds more than its parts use: 1 of 1 left",
    ),
    (with_turns(), "'conversations' is not a list of turns"),
    (with_turns({"from": "human"}), "a turn has no 'from' and 'value' text"),
    (
        with_turns({"from": "bing", "value": "x"}),
        "speaker is not one of human, gpt, system, user, assistant: bing",
    ),
    (
        with_turns({"from": [], "value": "x"}),
        "speaker is not one of human, gpt, system, user, assistant: []",
    ),
    (
        with_turns({"from": "human", "value": f"<image> {IMAGE}"}, image="good.png"),
        "image tags are of two kinds: <image> and <|image_1|> in one row",
    ),
    (
        with_turns(
            {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "A."}, image="good.png"
        ),
        "image tags do not name each image once: tags none, 1 images",
    ),
    (turn("Hi", "word " * 300), "too many tokens: "),
    ([1, 2], "the row is a list, not an object with named fields"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """good.png, and files of the same kind that are none."""
    data = write_picture(tmp_path / "good.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("<html>404</html>")
    (tmp_path / "scans.jpg").write_bytes(scans(80, 60))
    write_picture(tmp_path / "line.png", 1, 2000)
    return tmp_path


def rejected(out: Path) -> list[dict[str, Any]]:
    lines = (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_every_bad_row_of_messages_is_listed_with_its_reason(
    folder: Path, tiny_model: Path
) -> None:
    path = write_jsonl(folder / "rows.jsonl", [GOOD, *(row for row, _ in BAD_ROWS), GOOD])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"messages": [\n')
    reasons = [reason for _, reason in BAD_ROWS] + ["the row is not valid JSON: "]
    cfg = recipe(tiny_model, folder / "out", {"path": str(path)}, max_rejected=1, max_tokens=200)
    manifest = prepare(cfg)
    lines = rejected(folder / "out")
    for line, reason in zip(lines, reasons, strict=True):
        assert line.keys() == {"source", "row", "line", "id", "reason"}
        assert line["reason"].startswith(reason.replace("ROOT", str(folder))), line
        assert line["source"] == str(path)
    places = [line["row"] for line in lines]
    assert places == [*range(1, len(BAD_ROWS) + 1), len(BAD_ROWS) + 2]
    samples = list(Dataset(folder / "out", "train"))
    assert [sample.id for sample in samples] == ["good#0", f"good#{len(BAD_ROWS) + 1}"]
    assert [sample.meta["row"] for sample in samples] == [0, len(BAD_ROWS) + 1]
    assert manifest["rows"] == len(samples) + len(lines) == len(BAD_ROWS) + 3


def test_reasons_are_counted_by_what_stands_before_the_colon(
    folder: Path, tiny_model: Path
) -> None:
    path = write_jsonl(folder / "rows.jsonl", [GOOD, *(row for row, _ in BAD_ROWS)])
    manifest = prepare(recipe(tiny_model, folder / "out", {"path": str(path)}, max_rejected=1))
    kinds = Counter(line["reason"].split(":")[0] for line in rejected(folder / "out"))
    counted = manifest["rejected"]
    assert counted["by_reason"] == kinds
    assert counted["count"] == sum(kinds.values()) == len(BAD_ROWS) - 1  # no max_tokens here
    assert kinds["image does not exist"] == 4
    assert list(counted["by_reason"].values()) == sorted(kinds.values(), reverse=True)


def test_the_ids_of_rejected_rows_are_those_their_samples_would_have(
    folder: Path, tiny_model: Path
) -> None:
    names = ["a", 7, None, float("nan"), "", "\ud83d"]
    rows = [GOOD, *(turn("Hi", "", id=name) for name in names)]
    source = {"path": str(write_jsonl(folder / "rows.jsonl", rows))}
    prepare(recipe(tiny_model, folder / "out", source, max_rejected=1))
    assert [line["id"] for line in rejected(folder / "out")] == ["a", "7", *3 * [None], "\ud83d"]


def test_bad_rows_of_a_csv_are_listed(folder: Path, tiny_model: Path) -> None:
    rows = [
        ("Hat,good.png,r1", None),
        (",good.png,r1", "column 'title' is empty"),
        ("   ,good.png,r1", "column 'title' is empty"),
        ("Hat,,r1", "column 'picture' is empty"),
        ("Hat,gone.png,r1", f"image does not exist: {folder}/gone.png"),
        ("Hat,s3://x/a.png,r1", "image is at an address of another kind than http(s): s3://x/a"),
        ("Hat,good.png,", "column 'code', by which rows are split, is empty"),
        ("Hat,good.png", "the row has fewer fields than the header: line 9, 2 for 3"),
        ("Hat,good.png,r1,5", "the row has more fields than the header: line 10, 4 for 3"),
        ('"Hat" x,good.png,r1', "the row cannot be read as CSV: line 11, "),
        ("<|image_1|>,good.png,r1", "an answer holds an image tag: message 1"),
    ]
    path = folder / "rows.csv"
    path.write_text("title,picture,code\n" + "".join(f"{row}\n" for row, _ in rows))
    source = {"path": str(path), "user": IMAGE, "assistant": "A {title}.", "images": ["picture"]}
    split = {"by": "code"}
    manifest = prepare(recipe(tiny_model, folder / "out", source, split=split, max_rejected=1))
    assert (manifest["rows"], manifest["splits"]["train"]["samples"]) == (11, 1)
    reasons = [reason for _, reason in rows if reason]
    for line, reason in zip(rejected(folder / "out"), reasons, strict=True):
        assert line["reason"].startswith(reason)


def test_nan_and_null_are_empty(folder: Path, tiny_model: Path) -> None:
    values = {"title": ["Hat", None, "Cap"], "price": [1.5, 2.0, float("nan")]}
    pq.write_table(pa.table(values), folder / "rows.parquet")
    source = {"path": str(folder / "rows.parquet"), "user": "Hi", "assistant": "{title} {price}"}
    cfg = recipe(tiny_model, folder / "out", source, split={"by": "price"}, max_rejected=1)
    prepare(cfg)
    assert [sample.meta["reference"] for sample in Dataset(folder / "out", "train")] == ["Hat 1.5"]
    reasons = [line["reason"] for line in rejected(folder / "out")]
    assert reasons == ["column 'title' is empty", "column 'price' is empty"]


def test_more_rejected_rows_than_allowed_stop_with_nothing_published(
    folder: Path, tiny_model: Path
) -> None:
    rows = [GOOD] * 7 + [with_image("gone.png")] * 2 + [turn("Hi", "")]
    path = write_jsonl(folder / "rows.jsonl", rows)
    with pytest.raises(ConfigError) as caught:
        prepare(recipe(tiny_model, folder / "out", {"path": str(path)}, max_rejected=0.29))
    listed = folder / ".out.partial/rejected.jsonl"
    assert str(caught.value) == (
        f"3 of 10 rows of {path} cannot be used, max_rejected allows a share of 0.29: 2 x image "
        f"does not exist; 1 x an answer is empty; first: row 8, line 8 of {path}, image does not "
        f"exist: {folder}/gone.png; mend the rows that {listed} lists, or raise max_rejected"
    )
    assert len(listed.read_text().splitlines()) == 3
    assert not (folder / "out").exists()
    prepare(recipe(tiny_model, folder / "out", {"path": str(path)}, max_rejected=0.3))


def test_a_share_is_allowed_exactly(folder: Path, tiny_model: Path) -> None:
    """0.07 * 100 is 7.000000000000001 and 0.29 * 100 is 28.999999999999996."""
    rows = [turn("Hi", "Ho")] * 71 + [turn("Hi", "")] * 29
    source = {"path": str(write_jsonl(folder / "rows.jsonl", rows))}
    manifest = prepare(recipe(tiny_model, folder / "out", source, max_rejected=0.29))
    assert manifest["rejected"]["count"] == 29
