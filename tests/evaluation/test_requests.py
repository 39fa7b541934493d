"""Every line of a file of questions has its line of answers, or of what is wrong with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi3v.errors import ConfigError, SampleError
from phi3v.evaluation import requests
from phi3v.evaluation.ask import Asker, open_shown
from phi3v.evaluation.models import open_model
from phi3v.evaluation.requests import answer_file, check_files
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
        "gone": "none.png does not exist",
        "odd": "'images' is a str",
        "llava": "none.png does not exist",
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
        "red hats/A B.PNG": f"does not exist, there is {tmp_path / 'red hats/a b.png'}; name a",
        "https://a.b/c.png": "https://a.b/c.png is an address; bring the file and name its path",
        "data:image/png;base64,AAAA": "data:image/png;base64,AAAA is an address; bring the file",
        "red hats": f"{tmp_path / 'red hats'} is a folder; name a picture",
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
    with pytest.raises(ConfigError, match=r"--image https:/a.b/c.png is an address; bring"):
        open_shown(Path("https://a.b/c.png"))
