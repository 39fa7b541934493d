"""The layouts of docs/data.md, prepared from small rows of the same columns and types."""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from phi3v.config import DatasetConfig
from phi3v.config.load import build_recipe
from phi3v.data import Dataset
from phi3v.data.format import MANIFEST, SEAL, read_manifest
from phi3v.data.mixture import open_datasets
from phi3v.data.verification import listed_files
from phi3v.errors import ConfigError, ShardError
from phi3v.evaluation.metrics import Answer, score
from phi3v.files import sha256, write_json
from phi3v.functions import find_function
from phi3v.prepare import dataset as module
from phi3v.prepare import prepare
from phi3v.prepare.convert import converted
from phi3v.prepare.manifest import hub_sources
from phi3v.prepare.rows import Row
from phi3v.prepare.summary import summary
from phi3v.processing import Phi3VProcessor
from phi3v.processing.prompt import label
from phi3v.sample import IGNORED, Sample
from tests.commands import ROOT
from tests.tiny import recipe, turn, write_jsonl, write_picture

TEXT = (ROOT / "docs/data.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"```yaml\n# (\w+)\n(.*?)```", TEXT, flags=re.DOTALL))
IMAGE = datasets.Image()
TEXTS = datasets.Value("string")


def shown(name: str, model: Path, out: Path, **source: Any) -> DatasetConfig:
    """A recipe of the page for rows and a model that are here."""
    tree = yaml.safe_load(RECIPES[name])
    tree["source"].pop("config", None)
    tree["source"] |= source
    return build_recipe(
        DatasetConfig, tree | {"model": str(model), "out": str(out)}, Path("page"), ()
    )


def picture(seed: int) -> Image.Image:
    return Image.effect_noise((60 + seed, 40), 60).convert("RGB")


def said(model: Path, sample: Sample) -> str:
    tokenizer = Phi3VProcessor.from_pretrained(model).tokenizer
    return str(tokenizer.decode([i for i in sample.input_ids.tolist() if i >= 0]))


def asked(model: Path, sample: Sample) -> str:
    question = said(model, sample).partition("<|user|>")[2].partition("<|end|>")[0]
    return question.replace("<s>", "").strip()  # which follows each picture


def test_the_page_shows_the_layouts_that_are_tested() -> None:
    assert list(RECIPES) == ["finevision", "scienceqa", "vqav2", "convert"]


def test_finevision(tmp_path: Path, tiny_model: Path) -> None:
    pair = {"user": TEXTS, "assistant": TEXTS}
    number = datasets.List(datasets.Value("int64"))
    features = datasets.Features({"images": datasets.List(IMAGE), "texts": datasets.List(pair)})
    rows: dict[str, Any] = {
        "images": [[picture(1)], [picture(2), picture(3)], []],
        "texts": [
            [{"user": "What?", "assistant": "A hat."}, {"user": "Red?", "assistant": "Yes."}],
            [{"user": "Which?", "assistant": "The second."}],
            [{"user": "Hi", "assistant": "Ho"}],
        ],
        "source": ["ai2d"] * 3,
    }
    features["source"] = TEXTS
    for rating in ("relevance", "visual_dependency", "image_correspondence", "formatting"):
        features |= {f"{rating}_ratings": number, f"{rating}_min": datasets.Value("int64")}
        rows |= {f"{rating}_ratings": [[5, 4]] * 3, f"{rating}_min": [4] * 3}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).save_to_disk(tmp_path / "rows")
    cfg = shown("finevision", tiny_model, tmp_path / "out", path=str(tmp_path / "rows"))
    prepare(cfg)
    samples = {s.meta["row"]: s for split in ("train", "validation") for s in found(cfg, split)}
    assert [len(samples[row].images) for row in range(3)] == [1, 2, 0]
    assert [samples[row].meta["reference"] for row in range(3)] == ["Yes.", "The second.", "Ho"]
    assert asked(tiny_model, samples[0]) == "What?"
    ids = samples[1].input_ids.tolist()
    tokenizer = Phi3VProcessor.from_pretrained(tiny_model).tokenizer
    before = tokenizer.decode(ids[: ids.index(-1)])
    assert before.strip() == "<s><|user|>", "the pictures come first"


def found(cfg: DatasetConfig, split: str) -> list[Sample]:
    return list(Dataset(cfg.out, split))


def test_scienceqa(tmp_path: Path, tiny_model: Path) -> None:
    features = datasets.Features(
        {
            "image": IMAGE,
            "question": TEXTS,
            "choices": datasets.List(TEXTS),
            "answer": datasets.Value("int8"),
            "hint": TEXTS,
        }
    )
    rows = {
        "image": [picture(1), None],
        "question": ["Which is wet?", "Which is hot?"],
        "choices": [["fire", "rain"], ["ice", "sand", "lava"]],
        "answer": [1, 2],
        "hint": ["Look at it.", ""],
    }
    train = datasets.Dataset.from_dict(rows, features=features)
    own = train.select([1]).map(lambda row: row | {"question": "Which is cold?"})
    saved = datasets.DatasetDict({"train": train, "validation": own})
    saved.save_to_disk(tmp_path / "rows")
    cfg = shown("scienceqa", tiny_model, tmp_path / "out", path=str(tmp_path / "rows"))
    prepare(cfg)
    first, second = found(cfg, "train")
    assert (len(first.images), len(second.images)) == (1, 0)
    assert asked(tiny_model, first) == (
        "Which is wet?\nLook at it.\nA. fire\nB. rain\nAnswer with the letter."
    )
    assert asked(tiny_model, second) == (
        "Which is hot?\nA. ice\nB. sand\nC. lava\nAnswer with the letter."
    )
    assert [s.meta["reference"] for s in (first, second)] == ["B. rain", "C. lava"]
    (held_out,) = found(cfg, "validation")
    assert asked(tiny_model, held_out).startswith("Which is cold?")


def test_vqav2(tmp_path: Path, tiny_model: Path) -> None:
    given = ["2"] * 6 + ["two", "3", "3", "many"]
    answer = {"answer": TEXTS, "answer_confidence": TEXTS, "answer_id": datasets.Value("int64")}
    features = datasets.Features(
        {
            "question": TEXTS,
            "multiple_choice_answer": TEXTS,
            "answers": datasets.List(answer),
            "image_id": datasets.Value("int64"),
            "question_id": datasets.Value("int64"),
            "image": IMAGE,
        }
    )
    answers = [
        {"answer": text, "answer_confidence": "yes", "answer_id": k + 1}
        for k, text in enumerate(given)
    ]
    rows = {
        "question": ["How many hats?"],
        "multiple_choice_answer": ["2"],
        "answers": [answers],
        "image_id": [9],
        "question_id": [262148000],
        "image": [picture(1)],
    }
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    cfg = shown("vqav2", tiny_model, tmp_path / "out", path=str(path))
    prepare(cfg)
    (sample,) = [*found(cfg, "train"), *found(cfg, "validation")]
    assert (sample.id, sample.meta["references"]) == ("262148000", given)
    for said_now, value in (("2", 1.0), ("Two.", 1.0), ("3", 0.6), ("many", 0.3), ("4", 0.0)):
        answered = [Answer("r", "2", said_now, tuple(given))]
        assert score(["vqa_accuracy"], answered, None)["vqa_accuracy"].value == pytest.approx(value)


def test_a_function_makes_the_rows(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (module,) = re.findall(r"```\n# boxes.py\n(.*?)```", TEXT, flags=re.DOTALL)
    Path("boxes.py").write_text(module)
    write_picture(Path("a.png"))
    box = {"name": "hat", "x": 10}
    rows = [
        {"id": "left", "photo": "a.png", "width": 60, "boxes": [box]},
        {"id": "none", "photo": "a.png", "width": 60, "boxes": []},
        {"id": "torn", "photo": "a.png", "width": 60},
    ]
    write_jsonl(Path("raw.jsonl"), rows)
    cfg = shown("convert", tiny_model, tmp_path / "out")
    try:
        with pytest.raises(
            ConfigError, match="1 x the row cannot be converted; first: row 3, line"
        ):
            prepare(cfg)
        cfg = shown("convert", tiny_model, tmp_path / "out", max_rows=2)
        manifest = prepare(cfg)
    finally:
        sys.modules.pop("boxes", None)
    (sample,) = found(cfg, "train")
    assert (sample.id, sample.meta["reference"], len(sample.images)) == ("left", "left", 1)
    assert (manifest["rows"], manifest["left_out"], manifest["rejected"]["count"]) == (2, 1, 0)
    assert manifest["recipe"]["inputs"]["convert"] == sha256(Path("boxes.py"))


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("{1: 'a'}", "gave the key 1, no text"),
        ("(row for _ in row)", "gave a generator, not a dict"),
        ("[row]", "gave a list, not a dict"),
        ("row['nothing']", "raised KeyError, 'nothing'"),
    ],
)
def test_what_a_function_gives_is_a_row_or_the_row_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, fault: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "strange_rows.py").write_text(f"def convert(row):\n    return {body}\n")
    find_function.cache_clear()
    try:
        (row,) = converted([Row(0, {"a": "b"})], "strange_rows:convert")
    finally:
        sys.modules.pop("strange_rows", None)
        find_function.cache_clear()
    assert row.fault == f"cannot be converted: strange_rows:convert {fault}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("json:nothing", "source.convert json:nothing: module json has no function 'nothing'"),
        ("nowhere_at_all:f", "source.convert nowhere_at_all:f cannot be imported: ModuleNotFound"),
        ("json", "source.convert must be module:function, got 'json'"),
    ],
)
def test_a_function_that_is_not_there_is_refused(
    tmp_path: Path, tiny_model: Path, name: str, message: str
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [turn("Hi", "Ho")])
    with pytest.raises(ConfigError, match=re.escape(message)):
        prepare(recipe(tiny_model, tmp_path / "out", {"path": str(path), "convert": name}))


def own_rows(folder: Path) -> tuple[Path, Path]:
    """Training and validation rows, of which one of each shows the same picture."""
    for k in range(4):
        write_picture(folder / f"{k}.png", 80, 60, seed=k)
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    train = [turn("<image>", f"A {k}.", id=f"t{k}", images=[f"{k}.png"]) for k in range(3)]
    held_out = [turn("<image>", f"B {k}.", images=[n]) for k, n in enumerate(("copy.png", "3.png"))]
    return write_jsonl(folder / "train.jsonl", train), write_jsonl(folder / "val.jsonl", held_out)


def test_a_validation_file_of_ones_own_is_held_out_whole(tmp_path: Path, tiny_model: Path) -> None:
    train, own = own_rows(tmp_path)
    split = {"validation": {"path": str(own)}, "by": "id"}
    cfg = recipe(tiny_model, tmp_path / "out", {"path": str(train), "weight": 2}, split=split)
    manifest = prepare(cfg)
    assert [s.meta["reference"] for s in found(cfg, "validation")] == ["B 0.", "B 1."]
    assert len(found(cfg, "train")) == 6, "each training row twice, by its weight"
    assert {s.meta["source"] for s in found(cfg, "validation")} == {str(own)}
    assert manifest["near_duplicates"]["rows_across"] == 1
    lines = "\n".join(summary(tmp_path / "out", manifest))
    assert "1 training rows show a picture that a held-out row shows too" in lines
    assert prepare(cfg) == manifest
    own.write_text(own.read_text().replace("B 0.", "C."))
    with pytest.raises(ConfigError, match=r"another recipe: inputs\.source differ"):
        prepare(cfg)


@pytest.mark.parametrize("own", ["train.jsonl", "copy.jsonl"])
def test_rows_that_are_trained_on_are_not_held_out(
    tmp_path: Path, tiny_model: Path, own: str
) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [turn("Hi", "Ho")])
    (tmp_path / "copy.jsonl").write_bytes(train.read_bytes())
    split = {"validation": {"path": str(tmp_path / own)}}
    said = f"split.validation names {tmp_path / own}, which holds the very rows of source.path"
    with pytest.raises(ConfigError, match=re.escape(f"{said} {train}; name others, or hold out")):
        prepare(recipe(tiny_model, tmp_path / "out", {"path": str(train)}, split=split))


def test_a_file_has_no_other_split_to_hold_out(tmp_path: Path, tiny_model: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [turn("Hi", "Ho")])
    split = {"validation": {"split": "validation"}}
    with pytest.raises(ConfigError, match="split 'validation' has no meaning for .*a.jsonl, a '"):
        prepare(recipe(tiny_model, tmp_path / "out", {"path": str(path)}, split=split))


def test_a_leak_across_is_not_looked_for_where_the_recipe_says_so(
    tmp_path: Path, tiny_model: Path
) -> None:
    train, own = own_rows(tmp_path)
    split = {"validation": {"path": str(own)}, "near_duplicates": "ignore"}
    manifest = prepare(recipe(tiny_model, tmp_path / "out", {"path": str(train)}, split=split))
    assert manifest["near_duplicates"]["rows_across"] == 0
    assert manifest["splits"]["validation"]["samples"] == 2


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"validation": {}}, "split.validation names neither a path nor a split; write {path: "),
        ({"validation": {"path": "v.jsonl"}, "stratify": "x"}, "split.stratify 'x' has no meaning"),
        ({"validation": {"file": "v.jsonl"}}, "unknown key 'split.validation.file'"),
        ({"validation": 1}, "split.validation must be a share from 0 to below 1, got 1.0"),
        ({"validation": "v.jsonl"}, "split.validation must be float, got 'v.jsonl'"),
    ],
)
def test_a_split_that_says_something_else_is_refused(split: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(Path("m"), Path("out"), {"path": "a.jsonl"}, split=split)
    assert str(caught.value).startswith(message)


def test_own_rows_of_several_sources_are_refused() -> None:
    tree = {"model": "m", "out": "o", "source": [{"path": "a.csv"}, {"path": "b.csv"}]}
    tree["split"] = {"validation": {"path": "v.jsonl"}}  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="read as the source's, and there are 2 sources; make a"):
        build_recipe(DatasetConfig, tree, Path("x"), ())


def test_a_dataset_without_held_out_rows_names_both_ways_to_them(
    tmp_path: Path, tiny_model: Path
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [turn("Hi", "Ho")])
    for name in ("one", "two"):
        prepare(recipe(tiny_model, tmp_path / name, {"path": str(path)}))
    for folders in (["one"], ["one", "two"]):
        with pytest.raises(ShardError) as caught:
            open_datasets([tmp_path / f for f in folders], "validation", is_optional=True)
        assert "split: {validation: 0.1}" in str(caught.value)
        assert "split: {validation: {path: FILE}}" in str(caught.value)


def test_keys_that_say_nothing_leave_the_recipe_of_a_dataset_as_it_was(
    tmp_path: Path, tiny_model: Path
) -> None:
    """Its fingerprint decides the order of training."""
    source = {"path": str(write_jsonl(tmp_path / "rows.jsonl", [turn("Hi", "Ho")]))}
    prepare(recipe(tiny_model, tmp_path / "out", source))
    section = read_manifest(tmp_path / "out")["recipe"]["source"]
    assert list(section) == [
        *("path", "format", "image_root", "user", "assistant", "images", "references"),
        *("num_crops", "weight", "max_rows", "config", "split", "revision", "streaming"),
    ]
    named = recipe(tiny_model, tmp_path / "named", source | {"ignore": ["score"]})
    prepare(named)
    assert read_manifest(tmp_path / "named")["recipe"]["source"]["ignore"] == ["score"]
    assert json.loads((tmp_path / "named/manifest.json").read_text())["format_version"] == 2


def unsealed(manifest: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in manifest.items() if key != SEAL}


def test_a_license_is_told_by_the_manifest_and_may_be_named_later(
    tmp_path: Path, tiny_model: Path
) -> None:
    """It changes nothing in the dataset: neither its fingerprint nor a file."""
    sources = [
        {"path": str(write_jsonl(tmp_path / f"{name}.jsonl", [turn("Hi", name)]))} for name in "ab"
    ]
    out = tmp_path / "out"

    def made(*licenses: str | None) -> tuple[dict[str, Any], list[str]]:
        said: list[str] = []
        pairs = zip(sources, licenses, strict=True)
        named = [source | ({"license": text} if text else {}) for source, text in pairs]
        tree = {"model": str(tiny_model), "out": str(out), "source": named}
        prepare(build_recipe(DatasetConfig, tree, Path("recipe.yaml"), ()), said.append)
        return read_manifest(out), said

    before, _ = made(None, None)
    assert "licenses" not in before
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "begin", None)  # nothing is prepared again
        named, said = made(None, "cc-by-4.0")
        assert said == [f"{out}: the licenses that the recipe names are in manifest.json now"]
        assert made(None, "cc-by-4.0") == (named, [])
        assert made(None, None)[0] == before
    told = {"licenses": [{"source": sources[1]["path"], "license": "cc-by-4.0"}]}
    assert unsealed(named) == unsealed(before) | told
    assert listed_files(out), "the manifest's digest is of what it says now"
    shutil.rmtree(out)
    assert made(None, "cc-by-4.0")[0] == named, "the same, if it is named from the start"

    write_json(out / MANIFEST, named | {"shared_ids": 7})
    with pytest.raises(ShardError, match="manifest.json has SHA-256 .* not what was written"):
        made(None, None)


def test_the_manifest_tells_which_sources_are_of_the_hub(tmp_path: Path, tiny_model: Path) -> None:
    """Where the name of one can be told from a folder's: in the folder that prepare runs in."""
    rows = str(write_jsonl(tmp_path / "rows.jsonl", [turn("Hi", "Ho")]))
    paths = ["someone/dogs", rows, "someone/cats"]
    assert hub_sources(recipe(tiny_model, tmp_path, {"path": paths})) == {
        "hub": ["someone/dogs", "someone/cats"]
    }
    assert hub_sources(recipe(tiny_model, tmp_path, {"path": rows})) == {}
    assert "hub" not in prepare(recipe(tiny_model, tmp_path / "out", {"path": rows}))


def test_an_empty_license_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="^source.license must not be empty, got ' '"):
        recipe(tiny_model, tmp_path, {"path": "rows.jsonl", "license": " "})


def test_rows_held_out_of_ones_own_have_no_license_of_their_own(
    tmp_path: Path, tiny_model: Path
) -> None:
    train, held_out = (
        str(write_jsonl(tmp_path / f"{name}.jsonl", [turn("Hi", name)])) for name in "ab"
    )
    source, split = {"path": train, "license": "mit"}, {"validation": {"path": held_out}}
    manifest = prepare(recipe(tiny_model, tmp_path / "out", source, split=split))
    assert manifest["licenses"] == [{"source": train, "license": "mit"}]


def test_a_column_may_name_the_rows_everywhere(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"sku": f"s{k}", "q": "Hi", "a": "" if k == 1 else "Ho"} for k in range(3)]
    rows.append({"sku": None, "q": "Hi", "a": "Ho"})
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    source = {"path": str(path), "user": "{q}", "assistant": "{a}", "id": "sku"}
    cfg = recipe(tiny_model, tmp_path / "out", source, max_rejected=1)
    prepare(cfg)
    assert [sample.id for sample in found(cfg, "train")] == ["s0", "s2"]
    lines = (tmp_path / "out/rejected.jsonl").read_text().splitlines()
    rejected = [json.loads(line) for line in lines]
    assert [(r["id"], r["row"], r["line"]) for r in rejected] == [("s1", 1, 2), (None, 3, 4)]
    assert rejected[1]["reason"] == "column 'sku', which names the rows, is empty"
    with pytest.raises(ConfigError, match="has no column 'ean', it has: sku, q, a; name these"):
        prepare(recipe(tiny_model, tmp_path / "other", source | {"id": "ean"}))


def test_a_turn_that_is_not_trained_has_no_labels(tmp_path: Path, tiny_model: Path) -> None:
    row = turn("Hi", "Draft.")
    row["messages"] += turn("Again", "Final.")["messages"]
    row["messages"][1]["weight"] = 0
    last = turn("Hi", "Final.")
    last["messages"] += turn("Again", "Draft.")["messages"]
    last["messages"][3]["train"] = False
    none = turn("Hi", "Draft.")
    none["messages"][1]["loss"] = False
    path = write_jsonl(tmp_path / "rows.jsonl", [row, last, none])
    cfg = recipe(tiny_model, tmp_path / "out", {"path": str(path)}, max_rejected=1)
    manifest = prepare(cfg)
    tokenizer = Phi3VProcessor.from_pretrained(tiny_model).tokenizer
    for sample in found(cfg, "train"):
        trained = [i for i in sample.labels.tolist() if i >= 0]
        assert tokenizer.decode(trained) == "Final.<|end|>"
        assert sample.meta["reference"] == "Final."
        following = sample.input_ids[len(sample.prompt_ids) :]
        assert str(tokenizer.decode(following.tolist())).startswith("Final.<|end|>")
    reason = "no token is trained"
    assert manifest["rejected"]["by_reason"] == {reason: 1}
    audit = manifest["splits"]["train"]["audit"]
    assert audit["suspicious"] == {}
    assert audit["answers"] == {"trained": 2, "excluded": 2, "unrecorded_samples": 0}
    said = list(summary(tmp_path / "out", manifest))
    assert said[1] == "  2 answers trained, 2 excluded by their rows"
    del audit["answers"]  # as a dataset of before
    said = list(summary(tmp_path / "out", manifest))
    assert said[1] == "  of 2 samples it is not recorded which answers their rows exclude"


def test_a_sample_that_trains_other_answers_than_its_row_asks_for_stops_preparing(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels that are made wrongly: of one answer too few, and then of one too many."""
    row = turn("Hi", "One.", id="here")
    row["messages"] += turn("Again", "Two.")["messages"]

    def too_few(ids: Sequence[int], assistant_id: int, end_id: int) -> np.ndarray:
        labels = label(ids, assistant_id, end_id)
        labels[np.cumsum(np.asarray(ids) == assistant_id) == 2] = IGNORED
        return labels

    faults = [
        (1, "phi3v.prepare.samples.label", too_few, "its row asks to train an answer, "),
        (0, "phi3v.prepare.samples.SampleBuilder._leave_untrained", lambda *_: None, "tokens "),
    ]
    for weight, name, wrong, fault in faults:
        row["messages"][1]["weight"] = weight
        path = write_jsonl(tmp_path / f"{weight}.jsonl", [turn("Hi", "Ho"), row])
        cfg = recipe(tiny_model, tmp_path / f"out{weight}", {"path": str(path)}, max_rejected=1)
        with monkeypatch.context() as patched:
            patched.setattr(name, wrong)
            with pytest.raises(ShardError, match=f"^sample 'here' has wrong labels: {fault}"):
                prepare(cfg)
        assert not Path(cfg.out).exists()
        assert prepare(cfg)["splits"]["train"]["audit"]["suspicious"] == {}
