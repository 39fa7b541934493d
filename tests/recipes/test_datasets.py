"""The shipped dataset recipes, prepared from local rows of the same columns and types."""

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from phi3v.config import DatasetConfig, RunConfig, dump_yaml, load_recipe
from phi3v.config.dataset import ImagesSection
from phi3v.data import Dataset
from phi3v.data.format import read_manifest
from phi3v.evaluation.metrics import Answer, compile_pattern, is_lower_better, score
from phi3v.export import open_processor
from phi3v.export.opening import picture_settings
from phi3v.export.originals import write_originals
from phi3v.files import write_json
from phi3v.prepare import prepare
from phi3v.processing import Phi3VProcessor
from phi3v.processing.prompt import Message, encode_messages
from phi3v.sample import Sample
from phi3v.training.opening import describe_data
from tests.commands import ROOT, metrics, python, run
from tests.prepare.hosts import Host
from tests.recipes.standins import MAKERS, ROWS, Chat, StandIn, decode, make_nlvr2

RECIPES = ROOT / "launch" / "recipes"


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


def prepare_recipe(name: str, standin: StandIn, model: Path, out: Path, *values: str) -> Path:
    """Prepare a shipped recipe with nothing changed but where things are."""
    places = [*standin.overrides, f"model={model}", f"out={out}", "workers=1", *values]
    prepare(load_recipe(DatasetConfig, RECIPES / f"{name}_shards.yaml", places))
    return out


def read_rows(folder: Path) -> dict[int, Sample]:
    """All samples of all splits, by the row they were made of."""
    splits = read_manifest(folder)["splits"]
    return {sample.meta["row"]: sample for split in splits for sample in Dataset(folder, split)}


def assert_holds(sample: Sample, chat: Chat, processor: Phi3VProcessor) -> None:
    """The sample is this chat: its words, its answer, its pictures in their order."""
    canvases = [processor.canvas(decode(picture)) for picture in chat.pictures]
    counts = [processor.canvas_tokens(canvas) for canvas in canvases]
    messages = [
        Message(role=role, content=text)
        for turn in chat.turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    assert sample.input_ids.tolist() == encode_messages(processor.tokenizer, messages, counts)
    assert sample.meta["reference"] == chat.turns[-1][1]
    assert sample.meta.get("references") == chat.references
    assert len(sample.images) == len(canvases)
    for image, canvas in zip(sample.images, canvases, strict=True):
        assert np.array_equal(image.pixels, canvas)


@pytest.mark.parametrize("name", MAKERS)
def test_a_shipped_recipe_makes_the_chat_of_every_row(
    name: str, tmp_path: Path, tiny_model: Path, host: Host
) -> None:
    standin = MAKERS[name](tmp_path, host)
    folder = prepare_recipe(name, standin, tiny_model, tmp_path / "shards" / name)
    samples = read_rows(folder)
    assert sorted(samples) == list(range(ROWS)) == list(range(len(standin.chats)))
    num_crops = read_manifest(folder)["num_crops"]
    processor = Phi3VProcessor.from_pretrained(tiny_model, num_crops=num_crops)
    for row, chat in enumerate(standin.chats):
        assert_holds(samples[row], chat, processor)


@pytest.mark.parametrize("name", MAKERS)
def test_an_export_shows_pictures_as_the_shards_hold_them(
    name: str, tmp_path: Path, tiny_model: Path, host: Host
) -> None:
    standin = MAKERS[name](tmp_path, host)
    folder = prepare_recipe(name, standin, tiny_model, tmp_path / "shards" / name)
    places = [f"model.path={tiny_model}", f"data.shards={folder}"]
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir(), out.mkdir()
    cfg = load_recipe(RunConfig, RECIPES / f"{name}.yaml", places)
    (run / "config.yaml").write_text(dump_yaml(cfg))
    write_json(run / "data.json", describe_data(Dataset(folder, "train")))
    write_originals(str(tiny_model), out, torch.float32, picture_settings(run))
    processors = AutoProcessor.from_pretrained(out), open_processor(str(run))
    for row, sample in read_rows(folder).items():
        pictures = [Image.open(BytesIO(picture)) for picture in standin.chats[row].pictures]
        for processor in processors:
            for canvas, picture in zip(sample.images, pictures, strict=True):
                assert np.array_equal(processor.canvas(picture), canvas.pixels)
    assert all(processor.rules == ImagesSection() for processor in processors)


@pytest.mark.parametrize("name", MAKERS)
def test_the_run_recipes_metrics_score_the_answers_of_the_dataset(
    name: str, tmp_path: Path, host: Host
) -> None:
    settings = load_recipe(RunConfig, RECIPES / f"{name}.yaml", ()).eval
    references = [chat.turns[-1][1] for chat in MAKERS[name](tmp_path, host).chats]
    answers = [
        Answer(str(row), text, text, teacher_forced=text) for row, text in enumerate(references)
    ]
    pattern = compile_pattern(settings.pattern) if settings.pattern else None
    scores = score(settings.metrics, answers, pattern)
    for metric, found in scores.items():
        assert found.value == (0.0 if is_lower_better(metric) else 1.0), metric


@pytest.mark.slow
def test_the_shards_of_two_images_a_row_train(tmp_path: Path, tiny_model: Path) -> None:
    split = "split={validation: 0.4, by: identifier, near_duplicates: ignore}"
    out = tmp_path / "shards"
    prepare_recipe("nlvr2", make_nlvr2(tmp_path), tiny_model, out, split)
    values = [
        f"model.path={tiny_model}",
        f"data.shards={out}",
        f"deepspeed={ROOT / 'ds_configs' / 'zero3_cpu.json'}",
        "train={max_steps: 2}",
        "optim.warmup_ratio=0",
        "eval.rows=2",
    ]
    done = run(*python(RECIPES / "nlvr2.yaml", *values), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "nlvr2"
    assert [line["step"] for line in metrics(folder)] == [1, 2]
    assert metrics(folder)[0]["loss"] > metrics(folder)[1]["loss"]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    names = {"exact_match", "blind_exact_match", "constant_exact_match"}
    assert set(summary["metrics"]) == names
