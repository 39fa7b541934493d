"""The chain on real pictures that nobody drew for it: scikit-learn's handwritten digits."""

import json
from pathlib import Path

import pytest
import yaml

from tests.commands import BIN, ROOT, deepspeed, metrics, run

RECIPES = ROOT / "launch" / "recipes"


@pytest.mark.slow
def test_held_out_digits_are_read_and_only_seeing_helps(tmp_path: Path) -> None:
    recipe = yaml.safe_load((RECIPES / "digits.yaml").read_text())
    commands = [
        ["launch/recipes/digits.py", "data/digits"],
        ["launch/tiny_model.py", "models/digits", "--texts", "data/digits/digits.jsonl"]
        + ["--num_crops", "1"],
        ["launch/prepare.py", "launch/recipes/digits_shards.yaml"],
    ]
    for command, *arguments in commands:
        places = [ROOT / a if a.startswith("launch/") else a for a in arguments]
        done = run(BIN / "python", ROOT / command, *places, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    done = run(*deepspeed(2, RECIPES / "digits.yaml"), cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "runs/digits")) == recipe["train"]["max_steps"]
    scores = json.loads((tmp_path / "runs/digits/summary.json").read_text())["metrics"]
    # Chance is 0.10.
    assert scores["exact_match"]["n"] > 250
    assert scores["exact_match"]["value"] >= 0.90
    assert scores["blind_exact_match"]["value"] <= 0.20
