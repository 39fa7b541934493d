"""A suite of datasets: what its file may say, one loading of a model, one table, one file."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from phi3v.config.running import EvalSection
from phi3v.errors import ConfigError, Phi3VError
from phi3v.evaluation.evaluate import evaluate
from phi3v.evaluation.models import open_model
from phi3v.evaluation.suite import (
    Part,
    ask_about,
    check_suite_alone,
    compare_all,
    open_parts,
    read_suite,
    write_found,
)
from phi3v.evaluation.table import found_tables
from tests.commands import LAUNCH
from tests.evaluation.knowing import knowing

PATTERN = "Product: {title}, Category: {category}, Full Price: {price:float}"


@pytest.fixture
def suite(tmp_path: Path, tiny_shards: Path, mixed_shards: Path) -> Path:
    """Two datasets: another split, number of rows and length of answers, other metrics."""
    of_mixed = {"split": "train", "rows": 5, "metrics": ["anls"], "max_new_tokens": 3}
    of_products = {"rows": 7, "metrics": ["exact_match", "title_accuracy"], "pattern": PATTERN}
    return write(
        tmp_path,
        {"shards": str(tiny_shards), "eval": of_products | {"max_new_tokens": 8, "batch_rows": 4}},
        {"shards": str(mixed_shards), "name": "mixed", "eval": of_mixed | {"blind": False}},
    )


def write(folder: Path, *datasets: object) -> Path:
    path = folder / "suite.yaml"
    path.write_text(json.dumps({"datasets": datasets}), encoding="utf-8")  # JSON is YAML
    return path


def test_each_dataset_is_asked_by_its_own_settings_with_one_model(
    suite: Path, tiny_model: Path, tiny_shards: Path, mixed_shards: Path
) -> None:
    parts = read_suite(suite)
    assert [part.name for part in parts] == ["products", "mixed"]
    generator = open_model(tiny_model, 64)
    found = ask_about("tiny", generator, parts)
    for part, shards in zip(parts, (tiny_shards, mixed_shards), strict=True):
        settings = part.settings
        alone = open_model(tiny_model, settings.max_new_tokens, settings.batch_rows)
        expected = evaluate(alone, [str(shards)], settings)
        assert found[part.name].scores == expected.scores
        assert found[part.name].outcomes == expected.outcomes
        assert found[part.name].loss == expected.loss
    assert (len(found["products"].outcomes), len(found["mixed"].outcomes)) == (7, 5)
    assert not any(name.startswith("blind_") for name in found["mixed"].scores)


def test_two_models_are_in_one_table_and_one_file_and_are_compared_on_each_dataset(
    suite: Path, tiny_model: Path, tmp_path: Path
) -> None:
    parts = read_suite(suite)
    base = open_model(tiny_model, 4)
    (data, _) = open_parts(parts)
    told = knowing(base, [data[row] for row in range(len(data))])
    given = {"base": ask_about("base", base, parts), "told": ask_about("told", told, parts)}
    found = compare_all(parts, given)
    scores, differences = found_tables(found).split("\n\n")
    assert [line.split()[:2] for line in scores.splitlines()] == [
        ["dataset", "metric"],
        ["products", "loss"],
        ["products", "exact_match"],
        ["products", "title_accuracy"],
        ["mixed", "loss"],
        ["mixed", "anls"],
    ]
    assert scores.splitlines()[0].split() == ["dataset", "metric", "base", "told"]
    lines = differences.splitlines()
    assert re.split(r"  +", lines[0]) == ["dataset", "told - base", "difference"]
    assert lines[1].startswith("products ") and lines[1].endswith("told is better")
    assert [line.split()[0] for line in lines[1:]] == ["products", "products", "mixed"]
    write_found(tmp_path / "out.json", found)
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert (written["suite"], list(written["datasets"])) == (str(suite), ["products", "mixed"])
    for one in found:
        values = written["datasets"][one.part.name]
        assert values["shards"] == list(one.part.folders)
        assert values["eval"]["rows"] == one.part.settings.rows
        assert set(values["models"]) == {"base", "told"}
        assert len(values["models"]["told"]["answers"]) == one.part.settings.rows
    (pair,) = written["datasets"]["products"]["comparisons"]
    assert pair["differences"]["exact_match"]["verdict"] == "told is better"


@pytest.mark.parametrize(
    ("datasets", "fault"),
    [
        ([], "datasets must name at least one dataset, got [] (in {})"),
        ([{}], "missing key 'datasets[0].shards' in {}; "),
        ([{"shards": "a"}, {"shards": "b/a"}], "datasets has 'a' twice; give each a name of its o"),
        ([{"shards": "a", "rows": 5}], "unknown key 'datasets[0].rows' in {}; known are datasets"),
        (
            [{"shards": "a"}, {"shards": "b", "eval": {"metric": ["anls"]}}],
            "unknown key 'datasets[1].eval.metric' in {}; did you mean 'datasets[1].eval.metrics'?",
        ),
        (
            [{"shards": "a", "eval": {"rows": "x"}}],
            "datasets[0].eval.rows must be int, got 'x' in ",
        ),
        ([{"shards": "a", "eval": {"rows": -1}}], "eval.rows must be at least 0, got -1 (in {})"),
        (
            [{"shards": "a", "eval": {"every": 5}}],
            "datasets.eval.every is 5 for a, but a suite is ",
        ),
        ([{"shards": "a", "eval": {"at_start": True}}], "datasets.eval.at_start is True for a, bu"),
        ([{"shards": "", "name": "a"}], "datasets.shards must not be empty, got ''"),
    ],
)
def test_what_a_suite_file_may_not_say_is_refused_by_its_key(
    tmp_path: Path, datasets: list[object], fault: str
) -> None:
    path = write(tmp_path, *datasets)
    with pytest.raises(ConfigError) as caught:
        read_suite(path)
    assert str(caught.value).startswith(fault.replace("{}", str(path)))


def test_what_does_not_fit_a_dataset_is_refused_with_the_datasets_name(
    tmp_path: Path, tiny_shards: Path
) -> None:
    for settings, fault in (
        ({"metrics": ["blue"]}, "eval.metrics has 'blue', which is no metric; "),
        ({"split": "test"}, f"{tiny_shards} has no split 'test', it has: "),
        ({"rows": 0}, "eval.rows is 0, so there is nothing to evaluate; "),
    ):
        one = {"shards": str(tiny_shards), "name": "one"}
        path = write(tmp_path, one, {**one, "name": "two", "eval": settings})
        with pytest.raises(Phi3VError, match=re.escape(f"{path}, dataset 'two': {fault}")):
            open_parts(read_suite(path))
    with pytest.raises(ConfigError, match="^eval.rows is 0, so there is nothing to evaluate"):
        open_parts([Part("", (str(tiny_shards),), EvalSection(rows=0), "x")])


def test_settings_beside_a_suite_are_refused(
    suite: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_suite_alone([])
    main = runpy.run_path(str(LAUNCH / "evaluate.py"))["main"]
    monkeypatch.setitem(main.__globals__, "set_environment", lambda: None)
    for words, given in ((["eval.rows=5"], "eval.rows=5"), (["--split", "a"], "eval.split=a")):
        arguments = ["evaluate.py", str(tiny_model), "--suite", str(suite), *words]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(ConfigError, match=f"so {given} does not go with it; write it into the"):
            main()
    for words in (["--suite", str(suite), "--shards", "a"], []):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tiny_model), *words])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2


def test_the_command_asks_each_dataset_and_writes_one_file(
    suite: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main = runpy.run_path(str(LAUNCH / "evaluate.py"))["main"]
    monkeypatch.setitem(main.__globals__, "set_environment", lambda: None)
    out = tmp_path / "out.json"
    arguments = ["evaluate.py", str(tiny_model), "--suite", str(suite), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        *("dataset", "products", "products", "products", "mixed", "mixed")
    ]
    assert list(json.loads(out.read_text())["datasets"]) == ["products", "mixed"]
