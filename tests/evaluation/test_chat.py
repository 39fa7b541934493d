"""A conversation keeps what was said and shown, and survives what cannot be done."""

from collections.abc import Callable
from pathlib import Path

import pytest

from phi3v.errors import SampleError
from phi3v.evaluation.ask import Asker
from phi3v.evaluation.chat import Chat
from phi3v.evaluation.generation import Prompt
from phi3v.evaluation.models import open_model
from phi3v.processing import Phi3VProcessor

Talk = Callable[..., tuple[str, list[str], Chat]]


@pytest.fixture(scope="module")
def asker(tiny_model: Path) -> Asker:
    processor = Phi3VProcessor.from_pretrained(tiny_model)
    return Asker(open_model(tiny_model, max_new_tokens=6), processor, system="Be brief.")


@pytest.fixture(scope="module")
def pictures(catalogue: Path) -> list[Path]:
    return sorted((catalogue / "images").iterdir())[:2]


@pytest.fixture
def talk(asker: Asker) -> Talk:
    """Say these lines; returns what was said, what was noted, and the conversation."""

    def run(*lines: str) -> tuple[str, list[str], Chat]:
        said: list[str] = []
        notes: list[str] = []
        chat = Chat(asker, said.append, notes.append)
        chat.run(f"{line}\n" for line in lines)
        return "".join(said), notes[1:], chat

    return run


def contents(chat: Chat) -> list[str]:
    return [message["content"] for message in chat.messages]


def test_an_answer_is_that_of_the_whole_conversation(talk: Talk, asker: Asker) -> None:
    said, notes, chat = talk("What is it?", "", "And then?")
    first, second = said.splitlines()
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "user", "assistant"]
    assert contents(chat) == ["What is it?", first, "And then?", second]
    whole = asker.prompt(chat.messages[:3], [])
    assert asker.generator.answer([whole], quiet=True) == [second]
    assert asker.generator.answer([asker.prompt(chat.messages[2:3], [])], quiet=True) != [second]
    assert notes == []


def test_the_system_text_stands_first(talk: Talk, asker: Asker) -> None:
    prompt = asker.prompt(talk("Hi")[2].messages[:1], [])
    text = asker.processor.decode(prompt.ids)
    assert text.split()[:4] == ["<s><|system|>", "Be", "brief.<|end|>", "<|user|>"]


def test_pictures_are_shown_with_the_next_question_and_stay(
    talk: Talk, asker: Asker, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Prompt] = []
    stream = type(asker.generator).stream

    def record(self, prompt, show):  # type: ignore[no-untyped-def]
        asked.append(prompt)
        return stream(self, prompt, show)

    monkeypatch.setattr(type(asker.generator), "stream", record)
    first, second = (f"/image {path}" for path in pictures)
    pair = "And <|image_2|> beside <|image_1|>?"
    _, notes, chat = talk(first, "What?", second, pair, "So?", first, "Again?")
    assert [note.split(":")[0] for note in notes] == ["image 1", "image 2", "image 3"]
    assert contents(chat)[::2] == [
        "<|image_1|>\nWhat?",
        pair,
        "So?",
        "<|image_3|>\nAgain?",
    ]
    canvases = [asker.processor.canvas(picture) for picture in chat.pictures]
    shown = [[image.pixels.tobytes() for image in prompt.images] for prompt in asked]
    one, two, _ = (canvas.tobytes() for canvas in canvases)
    assert shown == [[one], [one, two, one], [one, two, one], [one, two, one, one]]


def test_reset_forgets_words_and_pictures(talk: Talk, pictures: list[Path]) -> None:
    said, notes, chat = talk("Hi", f"/image {pictures[0]}", "/reset", "Hi")
    assert len(chat.messages) == 2 and chat.pictures == []
    assert said.splitlines()[0] == said.splitlines()[1]
    assert notes[-1] == "the conversation starts anew"


def test_quit_ends_it(talk: Talk) -> None:
    assert talk("/quit", "Hi")[0] == ""


def test_what_cannot_be_done_is_said_and_changes_nothing(talk: Talk, tmp_path: Path) -> None:
    said, notes, chat = talk(
        f"/image {tmp_path}/none.png", "/what", "Is <|image_1|> red?", "word " * 5000, "Hi"
    )
    assert len(chat.messages) == 2 and said == f"{contents(chat)[1]}\n"
    assert notes[0] == f"image does not exist: {tmp_path}/none.png"
    assert notes[1].startswith("there is no /what; /image FILE shows")
    assert "do not number 0 images" in notes[2]
    assert "are more than the model's 4,096; shorten it" in notes[3]


def test_an_image_tag_that_the_model_says_is_text(talk: Talk, asker: Asker) -> None:
    class Says:
        """In the place of the generator: says a tag."""

        def stream(self, prompt: Prompt, show: Callable[[str], None]) -> str:
            return "<|image_1|>"

        def check(self, prompt: Prompt) -> None:
            assert prompt.images == ()

    chat = Chat(Asker(Says(), asker.processor), print, print)  # type: ignore[arg-type]
    chat.run(["Hi\n", "Go on\n"])
    assert contents(chat) == ["Hi", "<image_1>", "Go on", "<image_1>"]


def test_a_picture_given_at_the_start_must_be_one(asker: Asker, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="image does not exist: .*, which is a folder"):
        Chat(asker, print, print).add_picture(tmp_path)


def test_image_without_a_file_asks_for_one(talk: Talk) -> None:
    _, notes, chat = talk("/image", "/image ")
    assert notes == ["/image needs a file, as in /image picture.jpg"] * 2
    assert chat.pictures == []


def test_a_plain_tag_is_the_picture_that_waits_and_others_are_refused(
    talk: Talk, pictures: list[Path]
) -> None:
    first, second = (f"/image {path}" for path in pictures)
    said, notes, chat = talk(first, "Is <image> red?", second, "Or <image>?", "<video> too?")
    assert contents(chat)[::2] == ["Is <|image_1|> red?", "Or <|image_2|>?"]
    assert len(said.splitlines()) == 2
    assert notes[2].startswith("a tag stands for nothing: <video> in message 0")
