"""Ten thousand hostile rows, and a few hundred damaged files: no crash, and nothing lost."""

import contextlib
import csv
import json
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from phi3v.config import DatasetConfig, load_recipe
from phi3v.config.dataset import SourceSection
from phi3v.data import Dataset
from phi3v.errors import ConfigError, SampleError
from phi3v.prepare import prepare, verify
from phi3v.prepare.conversations import read_conversation
from phi3v.prepare.inputs import open_inputs
from phi3v.prepare.plan import WorkFolder
from phi3v.prepare.recipe import make_plan, resolved_recipe
from phi3v.prepare.sources import open_source
from phi3v.processing import Phi3VProcessor, bounded
from phi3v.processing.canvas import hd_canvas
from phi3v.sample import IGNORED, Sample
from tests.commands import LAUNCH, start
from tests.prepare.animals import Animal
from tests.prepare.pictures import GOOD, decoded
from tests.prepare.zoo import MAX_TOKENS, Zoo, make_zoo
from tests.tiny import turn, write_jsonl

ROWS = 10_000
PROGRESS = re.compile(r"(scan|write) out: +\d+%")  # where the machine is slow
MOST_BYTES = 1_000_000_000  # of memory of any process; 0.84 GB were measured, for a bomb
MOST_SECONDS = 8.0  # of CPU for a row; 2.1 were measured, for a bomb
DAMAGED = 150  # files of each kind

Place = tuple[str, int]  # source and row


@dataclass(frozen=True)
class Prepared:
    """What the command made of the zoo: every sample and every reason by the place of its row."""

    out: Path
    stderr: str
    peak_bytes: int
    samples: dict[Place, Sample]
    reasons: dict[Place, str]
    places: Counter[Place]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Zoo:
    folder = tmp_path_factory.mktemp("zoo")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    tokens = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    zoo = make_zoo(folder, tokens, ROWS)
    recipe = {"model": str(tiny_model), "out": "out", "source": zoo.sources}
    recipe |= {"max_tokens": MAX_TOKENS, "split": {"validation": 0.1}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return zoo


@pytest.fixture(scope="module")
def prepared(zoo: Zoo) -> Prepared:
    code, err, peak = command(zoo, "max_rejected=1", "workers=1")
    assert code == 0, err
    out = zoo.folder / "out"
    samples = [sample for split in ("train", "validation") for sample in Dataset(out, split)]
    by_place = {(sample.meta["source"], sample.meta["row"]): sample for sample in samples}
    with (out / "rejected.jsonl").open(encoding="utf-8") as file:
        rejected = [json.loads(line) for line in file]
    reasons = {(line["source"], line["row"]): line["reason"] for line in rejected}
    places = [(sample.meta["source"], sample.meta["row"]) for sample in samples]
    places += [(line["source"], line["row"]) for line in rejected]
    return Prepared(out, err, peak, by_place, reasons, Counter(places))


def command(zoo: Zoo, *values: str) -> tuple[int, str, int]:
    """Prepare the zoo by the real command; its exit code, stderr and most bytes of memory of any of
    its processes.

    Not wait4's: a child begins as a copy of the test process, and that one's memory counts there.
    """
    process = start(sys.executable, LAUNCH / "prepare.py", "recipe.yaml", *values, cwd=zoo.folder)
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            whole = psutil.Process(process.pid)
            for one in (whole, *whole.children(recursive=True)):
                peak = max(peak, most_bytes(one.pid))
        time.sleep(0.02)
    _, error = process.communicate()
    return process.returncode, error, peak


def most_bytes(number: int) -> int:
    """The most memory that a process has had so far; 0 if it has ended."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{number}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return 0


def used_seconds() -> float:
    """Of processor time, by this process and by those that decode for it."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = time.process_time() + ended.ru_utime + ended.ru_stime
    if (server := bounded._server) is None:
        return used
    living = psutil.Process(server.process.pid).cpu_times()
    return used + living.user + living.system


def config(zoo: Zoo, out: Path, *values: str) -> DatasetConfig:
    return load_recipe(DatasetConfig, zoo.folder / "recipe.yaml", [f"out={out}", *values])


def animals(zoo: Zoo) -> Iterator[tuple[Place, Animal]]:
    for path, inhabitants in zoo.animals.items():
        yield from (((path, row), animal) for row, animal in enumerate(inhabitants))


@pytest.mark.slow
def test_every_row_becomes_one_sample_or_one_rejection(zoo: Zoo, prepared: Prepared) -> None:
    assert prepared.places == Counter(place for place, _ in animals(zoo))
    assert prepared.places.total() == ROWS
    manifest = json.loads((prepared.out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["rows"] == ROWS and manifest["rejected"]["count"] == len(prepared.reasons)


@pytest.mark.slow
def test_good_rows_are_prepared_and_bad_ones_rejected_for_what_is_wrong(
    zoo: Zoo, prepared: Prepared
) -> None:
    surprises = [
        (place, animal.fate, prepared.reasons.get(place, GOOD))
        for place, animal in animals(zoo)
        if (place in prepared.samples) != (animal.fate == GOOD)
        or not prepared.reasons.get(place, GOOD).startswith(animal.fate)
    ]
    assert not surprises, (len(surprises), surprises[:5])


@pytest.mark.slow
def test_reasons_are_few_and_can_be_printed_on_a_line(prepared: Prepared) -> None:
    kinds = {reason.partition(":")[0] for reason in prepared.reasons.values()}
    assert len(kinds) <= 60
    for kind in kinds:
        assert not re.search(r"[\d/\\]", kind), kind
    for reason in prepared.reasons.values():
        assert reason.isprintable() and len(reason) <= 503, reason


@pytest.mark.slow
def test_canvases_are_those_of_the_first_frames_in_rgb(
    zoo: Zoo, prepared: Prepared, tiny_model: Path
) -> None:
    processor = Phi3VProcessor.from_pretrained(tiny_model)
    for place, animal in animals(zoo):
        if animal.fate != GOOD:
            continue
        canvases = prepared.samples[place].images
        assert len(canvases) == len(animal.pictures)
        for canvas, data in zip(canvases, animal.pictures, strict=True):
            expected = hd_canvas(decoded(data), processor.num_crops, processor.crop_size)
            assert np.array_equal(canvas.pixels, expected), place


@pytest.mark.slow
def test_typed_tokens_are_text_and_answers_alone_are_trained(
    zoo: Zoo, prepared: Prepared, tiny_model: Path
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    added = set(tokenizer.added_tokens_decoder)
    assistant, end = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])
    for place, animal in animals(zoo):
        if animal.fate != GOOD:
            continue
        sample = prepared.samples[place]
        ids, labels = sample.input_ids.tolist(), sample.labels.tolist()
        turns = [i for i in ids if i in added and i != tokenizer.bos_token_id]
        assert turns[1::2] == [end] * (len(turns) // 2), place
        assert turns.count(assistant) == len(animal.answers) + animal.untrained, place
        assert ids.count(tokenizer.bos_token_id) == 1 + len(animal.pictures), place
        trained = [t for t, kept in zip(ids, labels, strict=True) if kept != IGNORED]
        assert [kept for kept in labels if kept != IGNORED] == trained
        assert trained.count(end) == len(animal.answers) and trained[-1] == end
        texts = "".join(f"{answer.strip()}<|end|>" for answer in animal.answers)
        assert spoken(tokenizer.decode(trained)) == spoken(texts), place


def spoken(text: str) -> str:
    """A text as far as tokens keep it: the tokenizer itself takes U+2581 for a space."""
    return text.replace("\u2581", " ").replace("<|end|> ", "<|end|>").strip(" ")


@pytest.mark.slow
def test_the_zoo_is_quiet_and_fits_in_memory(prepared: Prepared) -> None:
    said = re.split(r"[\r\n]+", prepared.stderr)
    assert [line for line in said if line and not PROGRESS.match(line)] == []
    assert prepared.peak_bytes < MOST_BYTES, prepared.peak_bytes


@pytest.mark.slow
def test_the_zoo_prepared_by_two_workers_is_the_same_to_the_byte(
    zoo: Zoo, prepared: Prepared, tmp_path: Path
) -> None:
    verify(prepared.out)
    prepare(config(zoo, tmp_path / "out", "max_rejected=1", "workers=2"))
    again = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    manifest, before = again.pop("manifest.json"), (prepared.out / "manifest.json").read_bytes()
    assert again == {name: (prepared.out / name).read_bytes() for name in again}
    assert json.loads(manifest) == json.loads(before)


@pytest.mark.slow
def test_no_row_takes_long(zoo: Zoo, tmp_path: Path) -> None:
    cfg, work = config(zoo, tmp_path / "out"), WorkFolder(tmp_path / "work")
    work.path.mkdir()
    plan = make_plan(cfg, resolved_recipe(cfg), work)
    inputs = open_inputs(cfg, plan, work)
    slowest = 0.0
    for chunk in plan.chunks:
        part, before = inputs.parts[chunk.source], used_seconds()
        for _, conversation in inputs.conversations(chunk, [True] * (chunk.stop - chunk.start)):
            try:
                if not isinstance(conversation, SampleError):
                    pictures = [part.loader.picture(image) for image in conversation.images]
                    part.builder.build(conversation, pictures, {})
            except SampleError:
                pass
            now = used_seconds()
            slowest, before = max(slowest, now - before), now
    assert slowest < MOST_SECONDS, slowest


@pytest.mark.slow
def test_a_zoo_above_max_rejected_stops_with_one_line(zoo: Zoo) -> None:
    code, err, _ = command(zoo, "out=stopped")
    listed = zoo.folder / ".stopped.partial/rejected.jsonl"
    # A busy machine has told of its progress before.
    said = [line for line in err.splitlines() if line and not line.startswith("scan stopped:")]
    assert code == 2 and len(said) == 1, err
    line = re.compile(
        r"ConfigError: (\d+) of 10000 rows of .* cannot be used, max_rejected allows a share of "
        r"0\.05: \d+ x .*; first: row [\d,]+.*; mend the rows that (.*) lists, or raise "
        r"max_rejected"
    ).fullmatch(said[0])
    assert line is not None, err
    assert line[2] == str(listed)
    assert len(listed.read_bytes().splitlines()) == int(line[1]) > 0.05 * ROWS
    assert not (zoo.folder / "stopped").exists()
    assert said[0].isprintable()


def _write_list(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows))


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "text"], *([row["id"], 'a "b"\nc, d'] for row in rows)])


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    images = [{"bytes": b"x" * k, "path": None} for k in range(len(rows))]
    times = pa.array([10**15 * k for k in range(len(rows))], pa.timestamp("us", "UTC"))
    letters = pa.array([str(k % 3) for k in range(len(rows))]).dictionary_encode()
    table = pa.Table.from_pylist([row | {"image": i} for row, i in zip(rows, images, strict=True)])
    return table.append_column("time", times).append_column("letter", letters)


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(_table(rows), path, row_group_size=20)


def _write_stream(path: Path, rows: list[dict[str, Any]]) -> None:
    table = _table(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=16)


def _write_file(path: Path, rows: list[dict[str, Any]]) -> None:
    table = _table(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_jsonl),
        ("a.json", _write_list),
        ("a.csv", _write_csv),
        ("a.parquet", _write_parquet),
        ("stream.arrow", _write_stream),
        ("file.arrow", _write_file),
    ],
)
def test_a_damaged_file_is_refused_or_its_rows_are_rejected(
    tmp_path: Path, name: str, write: Callable[[Path, list[dict[str, Any]]], Any]
) -> None:
    path, random = tmp_path / name, Random(0)
    write(path, [turn(f"Question {k}", "\u00e9", id=f"r{k}") for k in range(40)])
    whole = path.read_bytes()
    columns = {"user": "{id}", "assistant": "{text}"} if path.suffix == ".csv" else {}
    section = SourceSection(path=str(path), **columns)
    ends = Counter(end for _ in range(DAMAGED) for end in ends_of(section, whole, random))
    assert ends["refused"] + ends["rejected"] > 0.3 * DAMAGED
    assert ends.keys() <= {"refused", "rejected", "read"}


@pytest.mark.parametrize(
    ("name", "find", "put", "message"),
    [
        ("a.parquet", b"letter", b"\xfftter.", "cannot be read as parquet: 'utf-8' codec"),
        ("a.json", b'"r7"', b"7" * 5000, "is not valid JSON: a number has too many digits, line 1"),
        ("a.json", b'"r7"', b"[" * 9999, "is not valid JSON: a row is nested too deeply, line 1"),
    ],
)
def test_what_chance_does_not_find_is_refused_too(
    tmp_path: Path, name: str, find: bytes, put: bytes, message: str
) -> None:
    path = tmp_path / name
    write = _write_list if path.suffix == ".json" else _write_parquet
    write(path, [turn(f"Question {k}", "A.", id=f"r{k}") for k in range(40)])
    path.write_bytes(path.read_bytes().replace(find, put))
    with pytest.raises(ConfigError, match=re.escape(f"source.path {path} {message}")):
        source = open_source(SourceSection(path=str(path)), tmp_path)
        list(source.read(0, source.num_rows))


def ends_of(section: SourceSection, whole: bytes, random: Random) -> Iterator[str]:
    """Damage a file; what comes of it, or of its rows."""
    data = bytearray(whole)
    if random.random() < 0.2:
        del data[random.randrange(len(data)) :]
    for _ in range(random.choice((1, 1, 3, 8)) if data else 0):
        start = random.randrange(len(data))
        data[start : start + random.choice((1, 1, 4))] = random.randbytes(random.choice((1, 4)))
    path = Path(section.paths[0])
    path.write_bytes(data)
    try:
        source = open_source(section, path.parent)
        again = open_source(section, path.parent, json.loads(json.dumps(source.state())))
        rows = list(again.read(0, again.num_rows))
    except ConfigError:
        yield "refused"
        return
    assert [row.number for row in rows] == list(range(source.num_rows))
    for row in rows:
        try:
            read_conversation(row, section)
            yield "read"
        except SampleError:
            yield "rejected"
