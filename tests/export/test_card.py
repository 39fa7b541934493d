"""The model card says what a checkpoint is, by the run's own records, and no path of a machine."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from phi3v.config import RunConfig, build_recipe
from phi3v.export.card import write_card, write_text_card
from tests.commands import ROOT
from tests.export.runs import SCORES, facts, move_run, read


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A run of step 3 that was evaluated, without its checkpoints."""
    ignore = shutil.ignore_patterns("checkpoints")
    folder = Path(shutil.copytree(made, tmp_path / "animals", ignore=ignore))
    entries = [{"step": 2, "loss": 9.0, "metrics": {}}, {"step": 3, "loss": 1.5, "metrics": SCORES}]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (folder / "evaluations.jsonl").write_text(lines)
    return folder


def card_of(run: Path, out: Path, step: int = 3, **config: Any) -> str:
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text(json.dumps(config))
    write_card(run, facts(step), out)
    return (out / "README.md").read_text(encoding="utf-8")


def section(card: str, title: str) -> str:
    return card.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_card_tells_scores_with_intervals_and_the_blind_control(
    run: Path, tmp_path: Path
) -> None:
    found = section(card_of(run, tmp_path / "out"), "Evaluation")
    assert "Held-out loss 1.5000." in found
    row = (
        "| exact_match | 50.0% [25.0%, 75.0%] | 12.5% [0.0%, 25.0%] n=15 | 6.2% [0.0%, 20.0%] | 16 "
        "| "
    )
    assert row in found
    assert "blind_exact_match" not in found and "constant_exact_match" not in found


def test_a_bar_in_a_metrics_description_begins_no_cell(run: Path, tmp_path: Path) -> None:
    scores = {"price_log_error": SCORES["exact_match"]}
    entry = {"step": 4, "loss": None, "metrics": scores}
    (run / "evaluations.jsonl").write_text(json.dumps(entry) + "\n")
    found = section(card_of(run, tmp_path / "out", step=4), "Evaluation")
    head, rule, row = found.strip().splitlines()[-3:]
    assert "mean \\|ln(predicted price / true price)\\|" in row
    assert row.replace("\\|", "").count("|") == head.count("|") == rule.count("|")


def test_a_step_without_evaluation_says_so(run: Path, tmp_path: Path) -> None:
    found = section(card_of(run, tmp_path / "out", step=4), "Evaluation")
    assert found.strip() == "Step 4 was not evaluated during the run."


def test_the_card_tells_data_versions_and_recipe(run: Path, tmp_path: Path) -> None:
    card = card_of(run, tmp_path / "out")
    data, training = section(card, "Data"), section(card, "Training")
    assert "Datasets: `animals` (weight 1).\nFingerprint: `" + "cd" * 32 in data
    assert "| samples | 1,234 |" in data and "| tokens | 56,789 |" in data
    assert "ranks: 2, ZeRO stage 3, on cpu x86_64" in training
    assert "versions: torch 2.13.0, deepspeed 0.19.8\n" in training
    assert "commit of phi3v: c0ffee" in training and "saved: 2026-11-21T12:00:00Z" in training
    assert "\n# Phi-3-Vision fine-tuned: animals, step 3\n" in card
    recipe = yaml.safe_load(section(card, "Recipe").split("```")[1].removeprefix("yaml"))
    assert recipe["optim"]["lr"] == 1e-5 and recipe["run"]["out"] == "animals"
    assert recipe.keys() == {"run", "model", "data", "optim", "train", "eval"}
    assert "null" not in section(card, "Recipe")
    build_recipe(RunConfig, recipe, Path("README.md"), [])


def test_no_path_of_the_machine_is_told(run: Path, tmp_path: Path) -> None:
    card = card_of(run, tmp_path / "out")
    base = Path(read_base(run))
    assert str(tmp_path) not in card and str(base.parent) not in card and "/mnt" not in card
    assert f"a folder `{base.name}`" in card


def test_a_relative_folder_is_told_by_its_name(run: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["run"]["out"], recipe["deepspeed"] = "runs/team/animals", "ours/zero3.json"
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    card = card_of(run, tmp_path / "out")
    assert "runs/team" not in card and "ours/" not in card


def read_base(run: Path) -> str:
    return str(yaml.safe_load((run / "config.yaml").read_text())["model"]["path"])


def test_the_hub_reads_the_head_of_the_card(
    run: Path, base: Path, tmp_path: Path, made: Path
) -> None:
    theirs = "---\nlicense: mit\nlicense_link: https://x.org/LICENSE\ntags: [code]\n---\nText\n"
    (base / "README.md").write_text(theirs)
    found = ModelCard(card_of(move_run(made, base, tmp_path / "moved"), tmp_path / "out")).data
    assert (found.library_name, found.pipeline_tag) == ("transformers", "image-text-to-text")
    assert (found.license, found.license_link) == ("mit", "https://x.org/LICENSE")
    assert found.base_model is None  # no repository of the hub
    assert ModelCard(card_of(run, tmp_path / "other")).data.license == "unknown"


def test_loading_is_told_as_it_is_for_this_folder(run: Path, tmp_path: Path) -> None:
    def loading(**config: Any) -> str:
        return section(card_of(run, tmp_path / "out", **config), "Loading")

    assert "--trust-remote-code` (the base's code is in the folder)" in loading(auto_map={"a": "b"})
    assert "`vllm serve DIR` where phi3v is installed" in loading()
    assert "which this model does not have" in loading(vision_config={"hidden_size": 96})


def test_the_code_of_loading_asks_a_question_as_the_page_does(run: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    card = section(card_of(run, tmp_path / "out"), "Loading")
    code, shown = (text.split("```python\n")[1].split("```")[0] for text in (card, page))
    assert code == shown and "model.generate(" in code
    compile(code, "README.md", "exec")


def test_the_text_half_has_a_short_card_of_its_own(run: Path, tmp_path: Path) -> None:
    write_text_card(run, facts(3), tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "\n# Phi-3-Vision fine-tuned: animals, step 3\n" in card
    assert "the text half" in card and "python convert_hf_to_gguf.py DIR" in card
    head = ModelCard(card).data
    assert (head.license, head.pipeline_tag, head.library_name) == ("unknown", None, None)
    assert str(tmp_path) not in card


def test_a_model_of_the_hub_is_named_as_the_base(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own card cannot be fetched here: the hub is out of reach, and nothing is in the cache."""
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["model"]["path"] = "microsoft/Phi-3-vision-128k-instruct"
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr("phi3v.export.card.find_base", lambda model, name: None)
    card = card_of(run, tmp_path / "out")
    assert ModelCard(card).data.base_model == "microsoft/Phi-3-vision-128k-instruct"
    assert "path: microsoft/Phi-3-vision-128k-instruct" in card
    assert read(tmp_path / "out" / "config.json") == {}
