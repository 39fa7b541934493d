"""Every line of a file of questions has its line of answers, or of what is wrong with it."""

import contextlib
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from PIL import Image

from phi3v import reading
from phi3v.errors import ConfigError, MachineError, SampleError
from phi3v.evaluation import ask, requests
from phi3v.evaluation.ask import Asker, open_shown
from phi3v.evaluation.models import open_model
from phi3v.evaluation.requests import answer_file, check_files
from phi3v.pictures import PUBLISHED
from phi3v.prepare.chats import read_messages
from phi3v.processing import Phi3VProcessor
from tests.tiny import write_jsonl, write_picture

Answer = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def asker(tiny_model: Path) -> Asker:
    processor = Phi3VProcessor.from_pretrained(tiny_model)
    return Asker(open_model(tiny_model, max_new_tokens=6, batch_rows=2), processor)


@pytest.fixture
def answer(asker: Asker, catalogue: Path, tmp_path: Path) -> Answer:
    """Answer rows of a file that lies in the catalogue's folder."""

    def run(rows: list[Any]) -> list[dict[str, Any]]:
        source = write_jsonl(catalogue / f"{tmp_path.name}.jsonl", rows)
        out = tmp_path / "sub" / "out.jsonl"
        out.parent.mkdir()
        try:
            assert answer_file(asker, source, out, read_messages) == len(rows)
        finally:
            source.unlink()
            assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]

    return run


def picture(catalogue: Path) -> str:
    return str(min((catalogue / "images").iterdir()).relative_to(catalogue))


def test_answers_come_in_the_order_of_the_rows(
    answer: Answer, asker: Asker, catalogue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "BATCHES", 1)
    rows = [{"id": f"r{n}", "prompt": "What is it? " * (5 - n)} for n in range(5)]
    rows[1]["images"] = [picture(catalogue)]  # type: ignore[assignment]
    found = answer(rows)
    assert [list(row) for row in found] == [["id", "prediction"]] * 5
    assert [row["id"] for row in found] == ["r0", "r1", "r2", "r3", "r4"]
    paths = [[catalogue / picture(catalogue)] if n == 1 else [] for n in range(5)]
    alone = [asker.ask(rows[n]["prompt"], paths[n]) for n in range(5)]
    assert [row["prediction"] for row in found] == alone
    assert len(set(alone)) > 2, "the answers must differ for their order to matter"


def test_messages_are_asked_up_to_their_last_answer(
    answer: Answer, asker: Asker, catalogue: Path
) -> None:
    image = {"type": "image", "image": picture(catalogue)}
    question = {"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}
    known = {"role": "assistant", "content": "A hat."}
    found = answer([{"messages": [question]}, {"id": 7, "messages": [question, known]}])
    expected = asker.ask("What is it?", [catalogue / picture(catalogue)])
    assert found == [{"id": "1", "prediction": expected}, {"id": 7, "prediction": expected}]


def test_a_picture_under_any_of_its_keys_is_shown(
    answer: Answer, asker: Asker, catalogue: Path
) -> None:
    name = picture(catalogue)
    question = [{"role": "user", "content": "<image>\nWhat is it?"}]
    found = answer(
        [
            {"prompt": "What is it?", "image": name},
            {"prompt": "<image>\nWhat is it?", "image_path": [name]},
            {"prompt": "What is it?", "images": [name], "source": "shop"},
            {"messages": question, "image": name},
            {"messages": question, "images": [name]},
        ]
    )
    expected = asker.ask("What is it?", [catalogue / name])
    assert [row["prediction"] for row in found] == [expected] * 5


def test_the_system_text_of_a_prompt_is_told_first(answer: Answer, asker: Asker) -> None:
    told = {"role": "system", "content": "Be brief."}
    chat = [told, {"role": "user", "content": "Hi"}]
    one, other = answer([{"prompt": "Hi", "system": "Be brief."}, {"messages": chat}])
    assert one["prediction"] == other["prediction"]


def test_a_row_of_its_own_system_text_keeps_it(answer: Answer, asker: Asker) -> None:
    told = [{"role": "system", "content": "Shout."}, {"role": "user", "content": "Hi"}]
    prompt = Asker(asker.generator, asker.processor, "Be brief.").prompt(told, [])  # type: ignore[arg-type]
    assert "Be brief" not in asker.processor.decode(prompt.ids)


def test_a_bad_row_says_why_and_spoils_no_other(
    asker: Asker, tmp_path: Path, tiny_model: Path
) -> None:
    lines = [
        '{"id": "good", "prompt": "Hi"}',
        '{"id": "cut off", "prom',
        "[1]",
        '{"prompt": ',
        '{"id": "nothing"}',
        '{"id": "mistyped", "promt": "What?"}',
        '{"id": "other", "question": "What?"}',
        '{"id": "picture", "image": "a.png"}',
        '{"id": "number", "prompt": 3}',
        '{"id": "both", "prompt": "Hi", "messages": [{"role": "user", "content": "Hi"}]}',
        '{"id": "gone", "prompt": "What?", "images": ["none.png"]}',
        '{"id": "odd", "prompt": "What?", "images": "none.png"}',
        '{"id": "llava", "prompt": "What?", "image": "none.png"}',
        '{"id": "twice", "prompt": "What?", "image": "a.png", "img": "b.png"}',
        '{"id": "film", "prompt": "What?", "video": "none.mp4"}',
        '{"id": "film tag", "prompt": "<video> What?"}',
        '{"id": "tools", "messages": [{"role": "user", "content": "Hi"}], "tools": [1]}',
        '{"id": "chat tag", "messages": [{"role": "user", "content": "<|image|>?"}]}',
        '{"id": "name", "messages": [{"role": "user", "name": "Bo", "content": "Hi"}]}',
        '{"id": "told", "prompt": "Hi", "system": 3}',
        '{"id": "null", "prompt": "What?", "images": [null]}',
        '{"id": "tags", "prompt": "<|image_3|>?"}',
        '{"id": "end", "messages": [{"role": "assistant", "content": "So."}]}',
        json.dumps({"id": "long", "prompt": "word " * 5000}),
        "",
        '{"id": "twice", "prompt": "Hi", "prompt": "Ho"}',
        '{"id": "good too", "prompt": "Hi"}',
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(SampleError, match=f"24 of 26 rows of {source} have no answer; {out} says"):
        answer_file(asker, source, out, read_messages)
    found = {row["id"]: row for row in map(json.loads, out.read_text("utf-8").splitlines())}
    assert found["good"]["prediction"] == found["good too"]["prediction"]
    reasons = {
        "2": "line 2 is not JSON: Unterminated string starting at, column 19",
        "3": "line 3 is a list, not an object",
        "4": "line 4 is not JSON: Expecting value, column 11",
        "nothing": "neither a 'prompt' nor 'messages'; its keys are id",
        "mistyped": "neither a 'prompt' nor 'messages'; it has 'promt': did you mean 'prompt'?",
        "other": "neither a 'prompt' nor 'messages'; its keys are id, question; write what",
        "picture": "neither a 'prompt' nor 'messages'; its keys are id, image; write what is asked "
        "as its 'prompt'",
        "number": "'prompt' is a int, not a text",
        "both": "a row has both a 'prompt' and 'messages'; leave one of them out",
        "gone": f"image does not exist: {tmp_path / 'none.png'}",
        "odd": "'images' is a str",
        "llava": f"image does not exist: {tmp_path / 'none.png'}",
        "twice": "a row has its pictures twice: 'image' and 'img'",
        "film": "a key is not understood: 'video' of the row; films are not read",
        "film tag": "a tag stands for nothing: <video>",
        "tools": "a key is not understood: 'tools' of the row; tools are not taught",
        "chat tag": "a tag stands for nothing: <|image|>",
        "name": "a key is not understood: 'name' of a turn",
        "told": "'system' is a int, not a text",
        "null": "an image is a NoneType",
        "tags": "do not number 0 images",
        "end": "nothing that asks for an answer",
        "long": "prompt is too long",
        "26": "line 26 is not JSON that can be read: an object has the key 'prompt' twice",
    }
    assert list(found) == ["good", *reasons, "good too"]
    for name, reason in reasons.items():
        assert set(found[name]) == {"id", "error"} and reason in found[name]["error"]


def test_odd_characters_part_no_row_and_come_back_as_they_were(
    asker: Asker, tmp_path: Path
) -> None:
    names = ["a\u2028b", "a\u0085b", "a\u2029b", "half \ud800", "nul \0", "line\nfeed"]
    lines = [json.dumps({"id": name, "prompt": "Hi"}).encode() for name in names]
    lines[0] = json.dumps({"id": names[0], "prompt": "Hi"}, ensure_ascii=False).encode()
    lines[1] = b'{"id": "a\\u0085b",\r"prompt": "Hi"}'  # white space of JSON
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    assert answer_file(asker, source, out, read_messages) == len(names)
    found = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [row["id"] for row in found] == names
    assert len({row["prediction"] for row in found}) == 1


def test_what_cannot_be_read_or_written_down_again_has_its_reason(
    asker: Asker, tmp_path: Path
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(
        b'{"id": "latin", "prompt": "caf\xe9"}\n{"id": NaN, "prompt": "Hi"}\n'
        b'{"id": [1e999], "prompt": "Hi"}\n{"id": 7, "prompt": "Hi"}\n'
    )
    with pytest.raises(SampleError, match="2 of 4 rows"):
        answer_file(asker, source, out, read_messages)
    found = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [row["id"] for row in found] == ["1", "2", "3", 7]
    assert found[0]["error"] == "line 1 is not UTF-8: byte 31"
    assert "prediction" in found[1], "an id that is not a number is none"
    assert found[2]["error"].startswith("'id' cannot be written as JSON: Out of range float")


def test_files_that_cannot_be_used_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("in.jsonl"), [])
    Path("folder").mkdir()
    Path("folder/old.jsonl").write_text("")
    refused = {
        ("none.jsonl", "z.jsonl"): "--jsonl none.jsonl does not exist; name a file of JSON lines",
        ("folder", "z.jsonl"): "--jsonl folder is a folder; name a file of JSON lines",
        ("in.jsonl", "in.jsonl"): "--out in.jsonl is the file that is read; name another",
        ("in.jsonl", "folder"): "--out folder is a folder; name a file",
        ("in.jsonl", "none/z.jsonl"): "--out none/z.jsonl: there is no folder none; make it",
        ("in.jsonl", "/dev/null"): "--out /dev/null is no file; name a file",
    }
    for (source, out), message in refused.items():
        with pytest.raises(ConfigError) as caught:
            check_files(Path(source), Path(out))
        assert str(caught.value) == message
    for out in ("z.jsonl", "folder/old.jsonl"):
        check_files(Path("in.jsonl"), Path(out))
    assert not Path("none").exists() and not Path("z.jsonl").exists()


def test_pictures_are_found_as_prepare_finds_them(asker: Asker, tmp_path: Path) -> None:
    write_picture(tmp_path / "red hats/a b.png")
    names = ["red hats/a b.png", "red%20hats/a%20b.png", "red hats\\a b.png"]
    names.append((tmp_path / "red hats/a b.png").as_uri())
    wrong = {
        "red hats/A B.PNG": f"A B.PNG; there is {tmp_path / 'red hats/a b.png'}",
        "https://a.b/c.png": "https://a.b/c.png is an address; bring the file and name its path",
        "data:image/png;base64,AAAA": "data:image/png;base64,AAAA is an address; bring the file",
        "red hats": f"image does not exist: {tmp_path / 'red hats'}, which is a folder",
    }
    rows = [{"id": None, "prompt": "What?", "images": [name]} for name in [*names, *wrong]]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    with pytest.raises(SampleError, match="4 of 8 rows"):
        answer_file(asker, source, tmp_path / "out.jsonl", read_messages)
    found = list(map(json.loads, (tmp_path / "out.jsonl").read_text("utf-8").splitlines()))
    assert [row["id"] for row in found] == [str(number) for number in range(1, 9)]
    assert len({row["prediction"] for row in found[:4]}) == 1
    for row, reason in zip(found[4:], wrong.values(), strict=True):
        assert reason in row["error"]


def test_a_picture_of_the_command_line_may_be_an_address_of_a_file(tmp_path: Path) -> None:
    write_picture(tmp_path / "a b.png")
    assert open_shown(Path((tmp_path / "a b.png").as_uri())).size
    with pytest.raises(ConfigError, match=r"--image: https:/a.b/c.png is an address; bring"):
        open_shown(Path("https://a.b/c.png"))


def shown(asker: Asker, folder: Path, names: dict[str, str], *roots: Path) -> dict[str, Any]:
    """Ask about each picture: its answer or why there is none."""
    rows = [{"id": name, "prompt": "What?", "images": [path]} for name, path in names.items()]
    out = folder / "out.jsonl"
    with contextlib.suppress(SampleError):
        answer_file(asker, write_jsonl(folder / "in.jsonl", rows), out, read_messages, roots)
    return {row["id"]: row for row in map(json.loads, out.read_text("utf-8").splitlines())}


def test_rows_reach_the_folder_of_their_file_or_those_of_image_root(
    asker: Asker, tmp_path: Path
) -> None:
    (tmp_path / "asked").mkdir()
    write_picture(tmp_path / "asked/a.png")
    write_picture(tmp_path / "home/a.png", seed=1)
    (tmp_path / "asked/link.png").symlink_to(tmp_path / "home/a.png")
    names = {"own": "a.png", "up": "../home/a.png", "link": "link.png", "other": "home/a.png"}
    found = shown(asker, tmp_path / "asked", names)
    assert "prediction" in found["own"]
    for name in ("up", "link"):
        assert found[name]["error"].startswith("image lies outside of the folders that may be read")
        assert found[name]["error"].endswith("; to allow it, name its folder in --image_root")
    found = shown(asker, tmp_path / "asked", names, tmp_path / "asked", tmp_path / "home")
    assert ["prediction" in row for row in found.values()] == [True, True, True, False]


def test_what_prepare_would_not_open_is_not_opened(
    asker: Asker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An EPS would start another program, a pipe would be waited for."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(ask, "MAX_PIXELS", 2_399)
    Image.new("RGB", (30, 30)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "eps.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "big.bmp").write_bytes(b"BM" + bytes(60))
    os.truncate(tmp_path / "big.bmp", 40 << 30)
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    write_picture(tmp_path / "wide.png", 60, 40)
    reasons = {
        "eps.png": "cannot identify image file, it is PostScript",
        "pipe.png": "image is not a plain file: pipe.png, it is a pipe",
        "big.bmp": "image has too many bytes: 42,949,672,960, big.bmp; max_row_bytes is 268,435,4",
        "zero.png": "image lies outside of the folders",
        "wide.png": "image has too many pixels: 60x40, wide.png; max_pixels is 2,399",
    }
    found = shown(asker, tmp_path, {name: name for name in reasons})
    for name, reason in reasons.items():
        assert reason in found[name]["error"]
        if name != "zero.png":
            with pytest.raises(ConfigError, match=f"--image: .*{name}"):
                open_shown(tmp_path / name)
    with pytest.raises(ConfigError, match="--image: image is not a plain file: .*, it is a device"):
        open_shown(tmp_path / "zero.png")
    assert not (tmp_path / "started").exists()


def test_a_row_that_the_machine_cannot_read_spoils_no_answer(
    asker: Asker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PAUSES", ())
    for name in ("a.png", "b.png"):
        write_picture(tmp_path / name)
    opened = os.open

    def failing(path: Any, *arguments: Any, **named: Any) -> int:
        if str(path).endswith("b.png"):
            raise OSError(errno.EIO, "Input/output error", path)
        return opened(path, *arguments, **named)

    monkeypatch.setattr(os, "open", failing)
    found = shown(asker, tmp_path, {"a": "a.png", "b": "b.png"})
    assert "prediction" in found["a"]
    assert "which is the machine's fault and not the file's" in found["b"]["error"]
    with pytest.raises(MachineError, match="b.png cannot be read"):
        open_shown(tmp_path / "b.png")


def test_questions_from_a_pipe_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "in.jsonl")
    with pytest.raises(ConfigError) as caught:
        check_files(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert str(caught.value) == (
        f"--jsonl {tmp_path / 'in.jsonl'} is a pipe; name a file of JSON lines"
    )


@pytest.mark.parametrize(
    "address",
    [
        "http://me:PASSWORD@h/a.png",
        "http:/me:PASSWORD@h/a.png",
        "sftp://me:PASSWORD@h/a.png",
        "htp://me:PASS/WORD@h/a.png",
        "https://h/a.png?key=PASSWORD",
    ],
)
def test_no_password_of_an_address_is_written_down(address: str) -> None:
    with pytest.raises(SampleError) as raised:
        ask.open_picture(address, PUBLISHED)
    assert "WORD" not in str(raised.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "What?", "images": ["a.png"] * 129}, "too many images: 129, 128 at most"),
        ({"prompt": "a" * 1_000_001}, "too much text: 1,000,001 characters, 1,000,000 at most"),
        (
            {"messages": [{"role": "user", "content": "a"}] * 10_001},
            "too many turns: 10,001, 10,000 at most",
        ),
    ],
)
def test_a_row_takes_no_more_than_one_of_a_dataset(
    row: dict[str, Any], reason: str, asker: Asker, tmp_path: Path
) -> None:
    assert asked(asker, tmp_path, [row]) == [{"id": "1", "error": reason}]


def test_pictures_of_a_row_are_in_memory_one_at_a_time_and_their_canvases_have_a_limit(
    asker: Asker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_picture(tmp_path / "a.png")
    opened = mock.Mock(wraps=ask.open_picture)
    monkeypatch.setattr(requests, "open_picture", opened)
    size = asker.processor.canvas(open_shown(tmp_path / "a.png")).nbytes
    monkeypatch.setattr(ask, "MAX_ROW_BYTES", 2 * size)
    (result,) = asked(asker, tmp_path, [{"prompt": "What?", "images": ["a.png"] * 9}])
    reason = f"images take too many bytes: {3 * size:,} for 3 images, {2 * size:,} at most"
    assert result["error"] == reason and opened.call_count == 3


def test_rows_are_held_as_far_as_their_canvases_allow_and_no_answer_changes(
    asker: Asker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_picture(tmp_path / "a.png")
    rows = [{"prompt": "What?", "images": ["a.png"]}] * 3
    together = asked(asker, tmp_path, rows)
    monkeypatch.setattr(requests, "BATCH_BYTES", 0)
    assert asked(asker, tmp_path, rows) == together


def asked(asker: Asker, folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is written of rows, some of which may have no answer."""
    out = folder / "out.jsonl"
    with contextlib.suppress(SampleError):
        answer_file(asker, write_jsonl(folder / "in.jsonl", rows), out, read_messages)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
