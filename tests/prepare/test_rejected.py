"""Nothing is lost silently: a row becomes a sample, or a line that says why it did not."""

import io
import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from phi3v.data import Dataset
from phi3v.errors import ConfigError, SampleError
from phi3v.prepare import prepare
from phi3v.prepare.images import load_image
from tests.tiny import recipe, turn, write_jsonl, write_picture

IMAGE = "<|image_1|>"
GOOD = turn(f"{IMAGE} What?", "This.", id="good", images=["good.png"])


def with_roles(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


def with_image(reference: Any) -> dict[str, Any]:
    return turn(IMAGE, "A.", images=[reference])


# A row of messages, and the start of the reason for which it cannot be used.
BAD_ROWS: list[tuple[Any, str]] = [
    (with_image("torn.png"), "image cannot be read: torn.png, "),
    (with_image("text.png"), "image cannot be read: text.png, cannot identify image file"),
    (with_image("line.png"), "image is too narrow: 1x2000 pixels, nothing of the short side is"),
    (with_image("gone.png"), "image does not exist: ROOT/gone.png"),
    (with_image("."), "image does not exist: ROOT"),
    (with_image("a\0b"), "image does not exist: ROOT/a\0b"),
    (with_image("x" * 5000), f"image does not exist: ROOT/{'x' * 300}..."),
    (with_image("https://x.org/a.png"), "image is a URL: https://x.org/a.png; download it and"),
    (with_image("data:image/png;base64,iVBO"), "image is a URL: data:image/png;base64,iVBO; "),
    (with_image(None), "image reference of type NoneType is no path or bytes"),
    (with_image({"path": None, "bytes": None}), "image reference of type NoneType is no path"),
    (with_image(7), "image reference of type int is no path or bytes"),
    (turn("Hi", ""), "an answer is empty: message 1"),
    (turn("Hi", " \n\t"), "an answer is empty: message 1"),
    (turn(IMAGE, "A."), "image tags do not name each image once: tags [1], 0 images"),
    (turn("Hi", "A.", images=["good.png"]), "image tags do not name each image once: tags none, 1"),
    (
        turn("<|image_2|>", "A.", images=["good.png"]),
        "image tags do not name each image once: tags",
    ),
    (turn(IMAGE + IMAGE, "A.", images=["good.png"]), "image tags do not name each image once: tag"),
    (turn(IMAGE, f"A {IMAGE}", images=["good.png"]), "an answer holds an image tag: message 1"),
    (turn(IMAGE, "A.", images="good.png"), "'images' is a str, not a list of images"),
    (turn("Hi<|end|>", "A."), "a text holds a control token: <|end|>, user"),
    (turn("Hi", "A<|assistant|>"), "a text holds a control token: <|assistant|>, assistant"),
    (turn("<s>old</s>", "A."), "a text holds a control token: <s>, user"),
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
    (turn("Hi", "word " * 300), "too many tokens: "),
    ([1, 2], "the row is a list, not an object with named fields"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """good.png, and files of the same kind that are none."""
    data = write_picture(tmp_path / "good.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("<html>404</html>")
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
        assert line.keys() == {"source", "row", "id", "reason"}
        assert line["reason"].startswith(reason.replace("ROOT", str(folder))), line
        assert line["source"] == str(path)
    places = [line["row"] for line in lines]
    assert places == [*range(1, len(BAD_ROWS) + 1), len(BAD_ROWS) + 2]
    samples = list(Dataset(folder / "out", "train"))
    assert [sample.id for sample in samples] == ["good", "good"]
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
        ("Hat,http://x.org/a.png,r1", "image is a URL: http://x.org/a.png; download it and"),
        ("Hat,good.png,", "column 'code', by which rows are split, is empty"),
        ("Hat,good.png", "the row has fewer fields than the header: line 9, 2 for 3"),
        ("Hat,good.png,r1,5", "the row has more fields than the header: line 10, 4 for 3"),
        ('"Hat" x,good.png,r1', "the row cannot be read as CSV: line 11, "),
        ("<|user|>,good.png,r1", "a text holds a control token: <|user|>, assistant"),
        ("<|image_1|>,good.png,r1", "an answer holds an image tag: message 1"),
    ]
    path = folder / "rows.csv"
    path.write_text("title,picture,code\n" + "".join(f"{row}\n" for row, _ in rows))
    source = {"path": str(path), "user": IMAGE, "assistant": "A {title}.", "images": ["picture"]}
    split = {"by": "code"}
    manifest = prepare(recipe(tiny_model, folder / "out", source, split=split, max_rejected=1))
    assert (manifest["rows"], manifest["splits"]["train"]["samples"]) == (12, 1)
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
        f"does not exist; 1 x an answer is empty; first: row 7, image does not exist: "
        f"{folder}/gone.png; mend the rows that {listed} lists, or raise max_rejected"
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


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged TIFF
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_a_damaged_picture_is_a_sample_error_whatever_pillow_raises(kind: str) -> None:
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, format=kind)
    refused = 0
    for _ in range(60):
        data = bytearray(buffer.getvalue())
        for position in random.integers(0, len(data), 4):
            data[position] = random.integers(256)
        try:
            load_image(bytes(data[: random.integers(len(data) // 2, len(data))]), Path())
        except SampleError as error:
            assert str(error).startswith("image cannot be read: ")
            refused += 1
    assert refused > 5


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_a_picture_of_any_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    picture = Image.new(mode, (5, 4))
    picture.save(tmp_path / "a.tiff")
    loaded = load_image("a.tiff", tmp_path)
    assert (loaded.mode, loaded.size) == ("RGB", (5, 4))


@pytest.mark.parametrize("error", [RuntimeError, struct.error, EOFError, KeyError])
def test_what_pillow_does_not_promise_to_raise_is_a_rejection_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Seen: RuntimeError from a damaged AVIF."""

    def fail(*_: object) -> None:
        raise error("deep inside")

    write_picture(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(SampleError, match="image cannot be read: a.png, .*deep inside"):
        load_image("a.png", tmp_path)


def test_a_bomb_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_picture(tmp_path / "a.png", 60, 60)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(SampleError, match="image cannot be read: a.png, Image size .* exceeds"):
        load_image("a.png", tmp_path)
