"""What a record of JSON must hold, and what is said of one that does not."""

import json
from pathlib import Path
from typing import Any

import pytest

from phi3v.errors import CheckpointError
from phi3v.shapes import COUNT, NUMBER, fault_of
from phi3v.training.faults import FaultLog
from phi3v.training.run_folder import RunFolder

LINE: dict[str, Any] = {"step": 1, "loss": 2.0}
SCORE = {"value": 0.5, "low": None, "high": 1.0, "n": 3}


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({"step": 1, "loss": None}, None),
        ({"step": 1, "loss": 1, "at": [{"a": 2}], "more": "x"}, None),
        ({"loss": 1.0}, "has no 'step'"),
        ({"step": "1", "loss": 1.0}, "has a str as 'step', not a whole number from 0"),
        ({"step": True, "loss": 1.0}, "has a bool as 'step', not a whole number from 0"),
        ({"step": 10**400, "loss": 1.0}, "has a number that is too large, or none as 'step', not"),
        ({"step": -1, "loss": 1.0}, "has -1 as 'step', not a whole number from 0"),
        ({"step": 1, "loss": float("nan")}, "as 'loss', not a finite number"),
        ({"step": 1, "loss": [1]}, "has a list as 'loss', not a finite number"),
        ({"step": 1, "loss": 1, "at": "x"}, "has a str as 'at', not a list"),
        ({"step": 1, "loss": 1, "at": [{}]}, "has no 'at.a'"),
        ({"step": 1, "loss": 1, "at": [{"a": 1, "b": 1}]}, "has 'at.b', which is not known"),
    ],
)
def test_a_record_that_is_not_of_its_kind_is_told_by_key(value: Any, fault: str | None) -> None:
    kind = {"step": COUNT, "loss": (NUMBER, None), "at?": [{"a": COUNT, "*": ()}]}
    found = fault_of(value, kind)
    assert found is None if fault is None else fault in str(found)


@pytest.mark.parametrize(
    ("name", "line", "fault"),
    [
        ("metrics", {"loss": 1.0}, "has no 'step'"),
        ("metrics", LINE | {"step": [1]}, "has a list as 'step'"),
        ("metrics", {"step": 1}, "has no 'loss'"),
        ("metrics", LINE | {"loss": float("nan")}, "as 'loss', not a finite number"),
        ("metrics", LINE | {"at": {"epoch": 0, "z": 1}}, "has 'at.z', which is not known"),
        ("metrics", LINE | {"lr": {"vision": "x"}}, "has a str as 'lr.vision'"),
        ("metrics", LINE | {"skipped": 5}, "has 5 as 'skipped', not str"),
        ("metrics", LINE | {"step_seconds": None}, "has null as 'step_seconds'"),
        ("evaluations", {"step": 2, "loss": 1.0}, "has no 'metrics'"),
        ("evaluations", LINE | {"metrics": [1]}, "has a list as 'metrics', not an object"),
        ("evaluations", LINE | {"metrics": {"anls": 5}}, "has 5 as 'metrics.anls', not an object"),
        ("evaluations", LINE | {"metrics": {"anls": SCORE | {"n": "x"}}}, "as 'metrics.anls.n'"),
        ("faults", {}, "has no 'step'"),
        ("faults", {"step": 1, "reason": "r"}, "has no 'at'"),
        ("faults", {"back_to": 1, "left_out": [{"epoch": "0"}]}, "has no 'step'"),
    ],
)
def test_a_line_of_a_run_that_no_run_writes_is_refused_by_its_number(
    tmp_path: Path, name: str, line: Any, fault: str
) -> None:
    path, run = tmp_path / f"{name}.jsonl", RunFolder(tmp_path)
    readers = {
        "metrics": run.read_metrics,
        "evaluations": run.read_evaluations,
        "faults": FaultLog(path).read,
    }
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(CheckpointError) as refused:
        readers[name]()
    assert f"{path} is damaged: line 1 " in str(refused.value) and fault in str(refused.value)
