"""The demo end to end, cut short: what `make demo` runs."""

import json
import sys
from pathlib import Path

import pytest

from tests.commands import LAUNCH, last_line, metrics, run

STEPS = 6


@pytest.mark.slow
def test_the_demo_runs_in_any_folder_and_starts_afresh(tmp_path: Path) -> None:
    values = [f"train.max_steps={STEPS}", "optim.warmup_steps=2", "eval.rows=20"]
    left = [tmp_path / place / "left" for place in ("runs/demo", "shards/demo", "models/demo")]
    for path in left:
        path.parent.mkdir(parents=True)
        path.write_text("of an earlier demo")
    done = run(sys.executable, LAUNCH / "demo.py", *values, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "runs/demo")) == STEPS
    assert not any(path.exists() for path in left)
    summary = json.loads((tmp_path / "runs/demo/summary.json").read_text())
    names = ("category_accuracy", "title_exact_match", "price_mape", "parse_rate")
    for name in (*names, "blind_category_accuracy"):
        assert summary["metrics"][name].keys() == {"value", "low", "high", "n"}
    assert "report: runs/demo/report.html" in done.stdout
    assert "category_accuracy" in done.stdout and "blind" in done.stdout
    assert (tmp_path / "runs/demo/export/model.safetensors").is_file()
    report = (tmp_path / "runs/demo/report.html").read_text()
    assert report.count("<img") == 12


@pytest.mark.slow
def test_a_mistake_in_an_override_ends_the_demo_with_its_line(tmp_path: Path) -> None:
    done = run(sys.executable, LAUNCH / "demo.py", "data.max_token=5", cwd=tmp_path)
    assert done.returncode == 2
    message = last_line(done, "ConfigError")
    assert "unknown key 'data.max_token'" in message
    assert "did you mean 'data.max_tokens'?" in message
    assert list(tmp_path.iterdir()) == []
