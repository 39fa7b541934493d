"""What docs/{evaluation,tracking,serving}.md show is run as it is written there."""

import io
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from phi3v.config import RunConfig, load_recipe
from phi3v.training.tracking import check_sinks
from tests.commands import LAUNCH, ROOT
from tests.export.runs import make_run

PAGES = ("evaluation", "tracking", "serving")
LINE = re.compile(r"^(?:WANDB_MODE=\w+ )?python (launch/.*)$", flags=re.MULTILINE)
TRAIN = "launch/train.py"
QUESTIONS = [
    {"id": "a", "prompt": "What is it?"},
    {"id": "b", "prompt": "What is it?", "images": ["data/products/images/P00001.jpg"]},
]


def commands() -> list[list[str]]:
    """The arguments of each command, the launched file first."""
    texts = [(ROOT / f"docs/{page}.md").read_text(encoding="utf-8") for page in PAGES]
    lines = [line.replace("RUN", "runs/products") for text in texts for line in LINE.findall(text)]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_shards: Path, catalogue: Path
) -> Path:
    """What the pages speak of: a model, shards of it, a run, pictures, questions."""
    place = tmp_path_factory.mktemp("pages")
    for name, target in (("models/tiny", tiny_model), ("shards/products", tiny_shards)):
        (place / name).parent.mkdir()
        (place / name).symlink_to(target)
    make_run(place / "runs/products", place / "models/tiny")
    pictures = place / "data/products/images"
    pictures.mkdir(parents=True)
    shutil.copy(min((catalogue / "images").iterdir()), pictures / "P00001.jpg")
    lines = [json.dumps(question) + "\n" for question in QUESTIONS]
    (place / "questions.jsonl").write_text("".join(lines))
    asked = {"shards": "shards/products", "eval": {"rows": 4, "max_new_tokens": 4}}
    (place / "suite.yaml").write_text(json.dumps({"datasets": [asked]}))  # JSON is YAML
    return place


def call(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", [words[0], *words[1:]])
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\n/quit\n"))
    runpy.run_path(str(LAUNCH / Path(words[0]).name))["main"]()


@pytest.mark.slow
def test_every_command_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    call(monkeypatch, ["launch/export.py", "runs/products", "--out", "exports/products"])
    run = [words for words in commands() if words[0] != TRAIN]
    for words in run:
        if words[0] == "launch/evaluate.py" and "--suite" not in words:
            words += ["eval.rows=4", "eval.max_new_tokens=4"]
        call(monkeypatch, words)
    assert len(run) >= 6
    found = json.loads((folder / "comparison.json").read_text())
    assert set(found["models"]) == {"models/tiny", "runs/products"}
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == ["a", "b"]
    assert (folder / "TEXT/config.json").is_file()
    assert "no difference seen" in capsys.readouterr().out


def test_every_run_that_they_start_has_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs themselves are started by other tests, with these keys; none of them online."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_MODE", "offline")
    started = [words for words in commands() if words[0] == TRAIN]
    for _, recipe, *overrides in started:
        check_sinks(load_recipe(RunConfig, Path(recipe), overrides))
    assert len(started) >= 4
