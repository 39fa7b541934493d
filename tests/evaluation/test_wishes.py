"""What launch/generate.py refuses before it opens a model, and how it answers."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from phi3v.errors import ConfigError
from phi3v.evaluation.ask import ask
from phi3v.evaluation.models import open_model
from phi3v.evaluation.wishes import Wishes, fulfil
from phi3v.prepare.chats import read_messages
from phi3v.processing import Phi3VProcessor
from tests.tiny import write_jsonl

A, B = Path("a"), Path("b")
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "exactly one of --prompt, --chat, --jsonl, got none"),
    ({"prompt": "x", "chat": True}, "got --prompt and --chat"),
    ({"prompt": "", "jsonl": A}, "got --prompt and --jsonl"),
    ({"jsonl": A}, "--jsonl and --out go together"),
    ({"chat": True, "out": A}, "--jsonl and --out go together"),
    ({"jsonl": A, "out": B, "images": [A]}, "--jsonl does not go with --image"),
    ({"jsonl": A, "out": B, "stream": True}, "--jsonl does not go with --stream"),
    ({"chat": True, "stream": False}, "--chat does not go with --no-stream"),
    ({"chat": True, "top_p": 0.5}, "--top_p needs --temperature"),
    ({"chat": True, "seed": 0}, "--seed needs --temperature"),
    ({"chat": True, "temperature": 0.0}, "--temperature must be above 0, got 0.0"),
    ({"chat": True, "temperature": float("nan")}, "--temperature must be above 0, got nan"),
    ({"chat": True, "temperature": 1.0, "top_p": 1.5}, "--top_p must be .* at most 1, got 1.5"),
    ({"chat": True, "max_new_tokens": 0}, "--max_new_tokens must be at least 1, got 0"),
    ({"prompt": "<image>\\nWhat?"}, "--prompt holds a backslash and an n, which are no line break"),
    ({"chat": True, "system": "Be brief.\\nBe kind."}, "--system holds a backslash and an n"),
    ({"chat": True, "batch_rows": 0}, "--batch_rows must be at least 1, got 0"),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Wishes(**options)


def test_files_are_looked_at_before_a_model_is_opened(tmp_path: Path) -> None:
    for wishes in (
        Wishes(prompt="What?", images=[tmp_path]),
        Wishes(jsonl=write_jsonl(tmp_path / "in.jsonl", []), out=tmp_path),
    ):
        with pytest.raises(ConfigError, match=f"{tmp_path},? (which )?is a folder; name a"):
            fulfil(wishes, open_nothing, open_nothing, read_messages)


def open_nothing() -> Any:
    raise AssertionError("a model is opened")


def test_a_file_of_answers_is_told_in_one_line(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "Hi"}])
    wishes = Wishes(jsonl=source, out=tmp_path / "out.jsonl", max_new_tokens=2)
    processor = Phi3VProcessor.from_pretrained(tiny_model)
    fulfil(wishes, lambda: open_model(tiny_model, 2), lambda: processor, read_messages)
    told = capsys.readouterr()
    assert told.err.endswith(f"rows answered: 1, in {tmp_path}/out.jsonl\n") and told.out == ""


def answered(model: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    wishes = Wishes(max_new_tokens=8, **options)
    processor = Phi3VProcessor.from_pretrained(model)
    fulfil(wishes, lambda: open_model(model, 8), lambda: processor, read_messages)
    return capsys.readouterr().out


def test_a_question_has_the_same_answer_at_once_or_in_pieces(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = ask(str(tiny_model), "What is it?", [], 8) + "\n"
    for stream in (None, True, False):
        assert answered(tiny_model, capsys, prompt="What is it?", stream=stream) == expected


def test_a_conversation_answers_on_stdout_and_talks_about_itself_on_stderr(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\n/reset\n"))
    out = answered(tiny_model, capsys, chat=True)
    assert out == ask(str(tiny_model), "What is it?", [], 8) + "\n"


def test_drawn_answers_follow_from_the_seed(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(seed: int) -> str:
        return answered(tiny_model, capsys, prompt="Hi", temperature=5.0, top_p=0.9, seed=seed)

    assert draw(1) == draw(1) != draw(2)
    greedy = answered(tiny_model, capsys, prompt="Hi")
    assert answered(tiny_model, capsys, prompt="Hi", temperature=1e-4) == greedy


def test_image_root_is_of_a_file_of_questions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--image_root goes with --jsonl alone, got --prompt"):
        Wishes(prompt="What?", image_root=[tmp_path])
    (tmp_path / "in.jsonl").write_text("")
    files = {"jsonl": tmp_path / "in.jsonl", "out": tmp_path / "out.jsonl"}
    Wishes(**files, image_root=[tmp_path]).check_files()
    with pytest.raises(ConfigError, match="--image_root .*/none is no folder; name one"):
        Wishes(**files, image_root=[tmp_path / "none"]).check_files()
