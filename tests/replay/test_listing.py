"""What is said of a step's samples: as text, and on a page with their pictures."""

import csv
import hashlib
import json
import math
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3v.data.mixture import qualified_id
from phi3v.data.packing import PlannedStep
from phi3v.errors import ConfigError
from phi3v.processing import Phi3VProcessor
from phi3v.replay.bisect import Carrier, by_excess, usual_loss
from phi3v.replay.check import Pair
from phi3v.replay.listing import list_step
from phi3v.replay.steps import open_step
from phi3v.training.opening import Run
from phi3v.view.tokens import TokenText
from tests.commands import LAUNCH
from tests.page import Page
from tests.replay.runs import open_recipe, write_run

Capture = pytest.CaptureFixture[str]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["replay.py", *map(str, arguments)])
    runpy.run_path(str(LAUNCH / "replay.py"))["main"]()


def test_every_sample_is_listed_pack_by_pack_with_where_it_comes_from(
    tmp_path: Path,
    tiny_model: Path,
    tiny_shards: Path,
    catalogue: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    run = open_recipe(tmp_path / "run", tiny_model, str(tiny_shards))
    with (catalogue / "products.csv").open(newline="") as file:
        titles = [product["title"] for product in csv.DictReader(file)]
    steps = write_run(run, run.plan.count(1) + 1)  # a whole epoch: pictures of all shapes
    for number, taken in enumerate(steps, 1):
        call(monkeypatch, tmp_path / "run", "--step", number)
        head, *lines = capsys.readouterr().out.splitlines()
        at = taken.at
        assert head.startswith(
            f"step {number} of {tmp_path}/run: epoch {at.epoch}, window {at.window}, step "
            f"{at.step} (each from 0); loss {3 - number / 10:.9g}, gradient norm 1.5; 8 packs, "
        )
        expected = list(listed(run, taken, tiny_shards, catalogue, titles))
        assert len(lines) == len(expected)
        for line, start in zip(lines, expected, strict=True):
            assert line == start if "answer " not in start else line.startswith(start)


def listed(
    run: Run, taken: PlannedStep, shards: Path, catalogue: Path, titles: list[str]
) -> Iterator[str]:
    """What the list should say; of an answer its beginning."""
    data = run.dataset
    for number, pack in enumerate(taken.packs, 1):
        sums = [int(v[pack].sum()) for v in (data.tokens, data.label_tokens, data.views)]
        sizes = "{:,} tokens, {:,} trained, {:,} views"
        yield f"pack {number} of 8: {len(pack):,} samples, {sizes.format(*sums)}"
        for index in pack.tolist():
            sample = data[index]
            (canvas,) = (image.pixels for image in sample.images)
            digest = hashlib.sha256(repr(canvas.shape).encode() + canvas.tobytes()).hexdigest()
            own = sizes.format(data.tokens[index], data.label_tokens[index], data.views[index])
            place = f"{catalogue}/products.csv, row {sample.meta['row'] + 1}"
            height, width = canvas.shape[:2]
            yield f"  {sample.id}: {own}"
            yield f"    dataset   {shards}, train[{index}]"
            yield f"    source    {place}"
            yield f"    picture 1 {width} x {height} pixels, sha256 {digest}"
            prompt = r"<s><|user|> \n<|image_1|><s> \nWhat is shown in this image?<|end|> \n"
            yield f'    prompt    "{prompt}<|assistant|>"'
            yield f'    answer    "Product: {titles[sample.meta["row"]]}, '


def test_samples_of_several_datasets_are_called_by_both_and_what_is_not_known_is_said(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, mixed_shards: Path
) -> None:
    shards = [{"path": str(tiny_shards)}, {"path": str(mixed_shards), "weight": 0.5}]
    run = open_recipe(tmp_path / "run", tiny_model, shards)
    steps = write_run(run, run.plan.count(1))
    text = TokenText(Phi3VProcessor.from_pretrained(tiny_model).tokenizer)
    opened = [open_step(tmp_path / "run", number) for number in range(1, len(steps) + 1)]
    lines = [line for step in opened for line in list_step(step, text)]
    named = [line for line in lines if line.startswith("  ") and line[2] != " "]
    found = [line.strip().split(": ")[0] for line in named]
    samples = np.concatenate([pack for step in steps for pack in step.packs]).tolist()
    assert found == [qualified_id(run.dataset, index) for index in samples]
    assert {name.split(":")[0] for name in found} == {"products", "shards"}
    without = sum(not run.dataset[index].images for index in samples)
    assert without
    assert sum("picture 1" in line for line in lines) == len(samples) - without


def test_the_page_shows_every_sample_with_its_picture_and_needs_nothing(
    tmp_path: Path,
    tiny_model: Path,
    tiny_shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    run = open_recipe(tmp_path / "<run>", tiny_model, str(tiny_shards))
    taken = write_run(run)[1]
    lines = run.folder.read_metrics()
    lines[1] |= {"loss": None, "skipped": "the loss is not finite"}
    (run.folder.path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    out = tmp_path / "new/step.html"
    call(monkeypatch, run.folder.path, "--step", 2, "--page", out)
    page = Page(out.read_text(encoding="utf-8"))
    assert capsys.readouterr().out == f"{out}: {out.stat().st_size / 1e3:,.0f} kB\n"
    assert "<run>" in page.text and "<run>" not in page.source
    assert "skipped: the loss is not finite" in page.text
    ids = [run.dataset[int(index)].id for index in np.concatenate(taken.packs)]
    headings = [part.partition("<")[0] for part in page.source.split("<h3>")[1:]]
    assert headings == ids and page.source.count("<article") == len(ids)
    assert page.source.count("<h2>Pack ") == 8
    links = [a[k] for _, a in page.tags for k in ("src", "href") if k in a]
    assert len(links) == 2 * len(ids) and all(link.startswith("data:image/") for link in links)
    with pytest.raises(ConfigError, match=f"--page {tmp_path} is a folder; name a file in it"):
        call(monkeypatch, run.folder.path, "--step", 2, "--page", tmp_path)


def test_a_step_is_a_number(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, "run", "--step", "last")
    assert caught.value.code == 2
    assert "--step: invalid int value: 'last'" in capsys.readouterr().err


def carrier(index: int, mean: float, trained: int = 10, norm: float = 1.0) -> Carrier:
    return Carrier(index, mean * trained, trained, norm)


def test_a_long_usual_answer_does_not_carry_what_a_short_strange_one_does() -> None:
    found = by_excess([carrier(0, 2.0, 500), carrier(1, 9.0, 5), carrier(2, 2.1, 20)])
    assert [each.index for each, _ in found] == [1, 2, 0]


def test_what_samples_add_is_the_steps_loss_above_the_usual() -> None:
    carriers = [carrier(k, mean, 3 + k) for k, mean in enumerate((2.0, 2.5, 7.0, 1.0))]
    loss = sum(c.loss for c in carriers) / sum(c.trained for c in carriers)
    added = sum(excess for _, excess in by_excess(carriers))
    assert added == pytest.approx(loss - usual_loss(carriers))


def test_what_is_not_finite_comes_first() -> None:
    carriers = [carrier(0, 50.0), carrier(1, math.nan), carrier(2, 2.0, norm=math.inf)]
    assert {each.index for each, _ in by_excess(carriers)[:2]} == {1, 2}


@pytest.mark.parametrize(
    ("written", "found", "difference", "words"),
    [
        (2.5, 2.5, 0.0, "loss 2.5, in metrics.jsonl 2.5 (the same bits)"),
        (2.0, 2.0002, 1e-4, "loss 2.0002, in metrics.jsonl 2 (1.0e-04 off)"),
        (None, None, 0.0, "loss not finite, in metrics.jsonl not finite (the same)"),
        (2.0, None, math.inf, "loss not finite, in metrics.jsonl 2 (differs)"),
        (0.0, 1e-6, 1e-4, "loss 1e-06, in metrics.jsonl 0 (1.0e-04 off)"),
    ],
)
def test_numbers_are_compared_by_their_bits_and_by_their_size(
    written: Any, found: Any, difference: float, words: str
) -> None:
    pair = Pair("loss", written, found)
    assert pair.difference == pytest.approx(difference, rel=1e-3) and str(pair) == words
