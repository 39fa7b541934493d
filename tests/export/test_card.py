"""The model card says what a checkpoint is, by the run's own records, and no path of a machine."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from phi3v.config import DatasetConfig, RunConfig, build_recipe, dump_yaml
from phi3v.export.card import write_card, write_text_card
from phi3v.export.records import is_hub_name, told
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
        "| exact_match | 50.0% [25.0%, 75.0%] | 12.5% [0.0%, 25.0%] n=15 | 6.2% [0.0%, 20.0%] n=16 "
        "| 16 | "
    )
    assert row in found
    assert "each row is asked about another row's pictures" in found
    assert "blind_exact_match" not in found and "constant_exact_match" not in found


def evaluated(run: Path, **entry: Any) -> None:
    """Have the run say that it was evaluated so at step 3."""
    line = {"step": 3, "loss": 1.5, "metrics": {"exact_match": SCORES["exact_match"]}, **entry}
    (run / "evaluations.jsonl").write_text(json.dumps(line) + "\n")


def test_a_control_that_was_not_run_is_not_spoken_of(run: Path, tmp_path: Path) -> None:
    evaluated(run)
    found = section(card_of(run, tmp_path / "out"), "Evaluation")
    assert "| exact_match | 50.0% [25.0%, 75.0%] | 16 |" in found
    for word in ("blind", "exchanged", "another row", "constant"):
        assert word not in found.lower(), word


def test_the_rows_that_were_asked_are_told_as_they_were(run: Path, tmp_path: Path) -> None:
    edit_data(run, mixture())
    evaluated(run, split="validation", loss_rows=1200, unanswered=7)
    found = section(card_of(run, tmp_path / "out"), "Evaluation")
    assert found.strip().startswith(
        "Held-out loss 1.5000 over 1,200 rows. Answers to rows of the split `validation` of "
        "`cats`. 7 rows were left unanswered for want of time, and are in no score."
    )
    evaluated(run, split="train", loss=None, metrics={})
    found = section(card_of(run, tmp_path / "out"), "Evaluation")
    assert found.strip() == "Training loss not finite."


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
    assert "| `animals` | 1 | not recorded | - | not recorded |" in data
    assert "Fingerprint: `" + "cd" * 32 in data
    assert "| samples | 1,234 |" in data and "| tokens | 56,789 |" in data
    assert "saved: 2026-11-21T12:00:00Z by 2 ranks, ZeRO stage 3\n" in training
    assert "versions: torch 2.13.0, deepspeed 0.19.8\n" in training
    assert "last start of the run: on cpu x86_64, commit of phi3v c0ffee" in training
    assert "\n# Phi-3-Vision fine-tuned: animals, step 3\n" in card
    recipe = yaml.safe_load(blocks(card, "yaml")[0])
    assert recipe["optim"]["lr"] == 1e-5 and recipe["run"]["out"] == "animals"
    assert recipe.keys() == {"run", "model", "data", "optim", "train", "eval"}
    assert "null" not in section(card, "Recipe")
    build_recipe(RunConfig, recipe, Path("README.md"), [])


def blocks(card: str, language: str) -> list[str]:
    """The fenced blocks of the recipe's section."""
    return re.findall(rf"```{language}\n(.*?)```", section(card, "Recipe"), re.DOTALL)


def edit_recipe(run: Path, *overrides: str) -> None:
    values = yaml.safe_load((run / "config.yaml").read_text())
    cfg = build_recipe(RunConfig, values, Path("config.yaml"), overrides)
    (run / "config.yaml").write_text(dump_yaml(cfg))


def edit_data(run: Path, datasets: list[dict[str, Any]]) -> None:
    """Have the run say that it was trained on these, the second counted a quarter."""
    shards = [{"path": d["folder"], "weight": w} for d, w in zip(datasets, (1, 0.25), strict=False)]
    edit_recipe(run, f"data.shards={json.dumps(shards)}")
    data = read(run / "data.json") | {"datasets": datasets}
    (run / "data.json").write_text(json.dumps(data))


def mixture() -> list[dict[str, Any]]:
    """Two datasets as data.json tells them, one of the disk and one of the hub."""
    of_disk = {"path": "/mnt/raw/cats.jsonl", "image_root": "/mnt/raw", "weight": 1.0}
    of_hub = {"path": "someone/dogs", "user": "What?", "assistant": "{a}", "revision": "main"}
    return [
        {
            "folder": "/mnt/disk7/shards/cats",
            "splits": {"train": {"samples": 1000}, "validation": {"samples": 100}},
            "rejected": {"count": 3, "by_reason": {"no text": 3}},
            "recipe": {
                "source": [of_disk],
                "model": "/mnt/models/base",
                "num_crops": None,
                "split": {"validation": 0.1},
                "inputs": {"source": "ab" * 32},
            },
            "licenses": [{"source": "/mnt/raw/cats.jsonl", "license": "cc-by-4.0"}],
            "hub": [],
        },
        {
            "folder": "/mnt/disk7/shards/dogs",
            "splits": {"train": {"samples": 234}},
            "rejected": {"count": 0, "by_reason": {}},
            "recipe": {
                "source": of_hub,
                "model": "/mnt/models/base",
                "split": {"validation": {"path": "/mnt/raw/own.jsonl"}},
            },
            "licenses": [],
            "hub": ["someone/dogs"],
        },
    ]


def test_every_dataset_of_a_mixture_is_told_with_weight_samples_and_license(
    run: Path, tmp_path: Path
) -> None:
    edit_data(run, mixture())
    card = card_of(run, tmp_path / "out")
    data, licenses = section(card, "Data"), section(card, "License")
    assert "| `cats` | 1 | 1,000 | validation 100 | 3 |" in data
    assert "| `dogs` | 0.25 | 234 | - | 0 |" in data
    assert "- `cats`: cc-by-4.0 (`cats.jsonl`)\n" in licenses
    assert "No license is named for `dogs`." in licenses
    head = ModelCard(card).data
    assert (head.datasets, head.data_license) == (["someone/dogs"], ["cc-by-4.0"])
    assert head.license == "unknown", "that of the data is not that of the model"
    assert "/mnt" not in card
    recipes = [yaml.safe_load(text) for text in blocks(card, "yaml")]
    assert [part["path"] for part in recipes[0]["data"]["shards"]] == ["cats", "dogs"]
    of_cats, of_dogs = (build_recipe(DatasetConfig, r, Path("card"), []) for r in recipes[1:])
    assert [source.path for source in of_cats.sources] == ["cats.jsonl"]
    assert [source.path for source in of_dogs.sources] == ["someone/dogs", "own.jsonl"]
    assert (of_cats.out, of_cats.model) == ("cats", "base")


def test_two_datasets_of_one_name_are_told_apart(run: Path, tmp_path: Path) -> None:
    edit_data(run, [{**entry, "folder": f"/mnt/{n}/cats"} for n, entry in enumerate(mixture())])
    card = card_of(run, tmp_path / "out")
    assert "| `cats` | 1 |" in card and "| `cats-2` | 0.25 |" in card
    assert "launch/prepare.py cats-2.yaml" in card


def test_the_modules_that_were_trained_and_those_that_were_frozen_are_told(
    run: Path, tmp_path: Path
) -> None:
    everything = "vision, projector, language, embeddings and head"
    assert f"All of its modules were trained: {everything}." in card_of(run, tmp_path / "out")
    edit_recipe(run, "model.freeze=[vision, embeddings]", "optim.head_lr=3e-6")
    card = card_of(run, tmp_path / "out")
    told = "Trained: projector, language and head. Frozen: vision and embeddings."
    assert told in card and "all of its" not in card.lower() and "all its parameters" not in card
    rates = "peak learning rates: projector 1e-05, language 1e-05, head 3e-06; cosine schedule"
    assert rates in section(card, "Training")
    write_text_card(run, facts(3), tmp_path)
    assert told in (tmp_path / "README.md").read_text()


def test_the_batch_and_the_deepspeed_json_are_told_without_paths(run: Path, tmp_path: Path) -> None:
    assert "batch" not in section(card_of(run, tmp_path / "out"), "Training")  # nobody knows it
    shipped = read(ROOT / "ds_configs/zero3.json") | {"train_batch_size": 48}
    place = {"device": "nvme", "nvme_path": "/local/host17/swap"}
    shipped["zero_optimization"]["offload_optimizer"] = place
    shipped["flops_profiler"] = {"enabled": False, "output_file": "/mnt/flops"}
    (run / "deepspeed.json").write_text(json.dumps(shipped))
    edit_recipe(run, "deepspeed=/mnt/ours/zero3.json")
    card = card_of(run, tmp_path / "out")
    training = section(card, "Training")
    assert "batch: 48 packs a step, each of 8,192 tokens and " in training
    assert "precision: bfloat16; AdamW" in training
    (found,) = blocks(card, "json")
    assert "/mnt" not in card and "host17" not in card
    told = json.loads(found)
    assert told["zero_optimization"]["offload_optimizer"]["nvme_path"] == "swap"
    assert told["optimizer"] == shipped["optimizer"] and "flops_profiler" not in told
    assert yaml.safe_load(blocks(card, "yaml")[0])["deepspeed"] == "deepspeed.json"
    assert "train.py run.yaml --deepspeed_config deepspeed.json  # on 2 ranks" in card
    del shipped["bf16"]
    (run / "deepspeed.json").write_text(json.dumps(shipped))
    assert "precision: float32" in card_of(run, tmp_path / "out")


def test_the_commands_are_those_of_the_runs_own_files(run: Path, tmp_path: Path) -> None:
    found = section(card_of(run, tmp_path / "out", torch_dtype="bfloat16"), "Commands")
    commands = found.split("```")[1].strip().splitlines()
    assert commands == [
        "python launch/train.py run.yaml  # on 2 ranks: under deepspeed, torchrun or srun",
        "python launch/export.py animals --out DIR --step 3 --dtype bf16",
    ]
    edit_data(run, mixture())
    found = section(card_of(run, tmp_path / "out"), "Commands")
    assert "\npython launch/prepare.py cats.yaml\npython launch/prepare.py dogs.yaml\n" in found


def test_what_a_run_went_through_is_told(run: Path, tmp_path: Path) -> None:
    """That it diverged, that it saw one pack alone, and how many samples up to this step."""
    assert "diverged" not in card_of(run, tmp_path / "out")
    (run / "summary.json").write_text(json.dumps({"diverged": "the loss was 1 at first, and 9"}))
    lines = [{"step": step, "loss": 1.0, "samples": 10} for step in (1, 2, 3, 4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    edit_recipe(run, "debug.overfit_one_pack=true")
    card = card_of(run, tmp_path / "out")
    assert (
        "- the run diverged: the loss was 1 at first, and 9\n- steps: 3, over 30 samples\n" in card
    )
    assert "only the first pack was trained on" in section(card, "Data")


def test_the_hub_reads_the_scores_with_intervals_and_numbers_and_no_control(
    run: Path, tmp_path: Path
) -> None:
    edit_data(run, mixture())
    no_rows = {"value": None, "low": None, "high": None, "n": 0}
    evaluated(run, split="validation", metrics={**SCORES, "anls": no_rows})
    card = card_of(run, tmp_path / "out")
    index = yaml.safe_load(card.split("---")[1])["model-index"]
    name, results = model_index_to_eval_results(index)
    (result,) = results
    assert name == "animals, step 3" and ModelCard(card).data.eval_results == results
    assert (result.metric_type, result.metric_value) == ("exact_match", 0.5)
    assert result.metric_name == "exact_match (95% interval 25.0% to 75.0%, n=16)"
    assert result.metric_args == {"low": 0.25, "high": 0.75, "n": 16}
    assert (result.task_type, result.dataset_name) == ("image-text-to-text", "cats")
    assert result.dataset_split == "validation"
    assert ModelCard(card_of(run, tmp_path / "out", step=4)).data.eval_results is None
    write_text_card(run, facts(3), tmp_path)
    head = ModelCard((tmp_path / "README.md").read_text()).data
    assert head.eval_results is None, "the text half was shown no picture"


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
    told = "The card of the base names the license `mit`, which stands in the head of this one."
    assert told in (tmp_path / "out/README.md").read_text()
    other = card_of(run, tmp_path / "other")
    assert ModelCard(other).data.license == "unknown"
    assert "No license of the base is known here. No license is named for `animals`." in other


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
    assert "The text half" in card and "python convert_hf_to_gguf.py DIR" in card
    head = ModelCard(card).data
    assert (head.license, head.pipeline_tag, head.library_name) == ("unknown", None, None)
    assert str(tmp_path) not in card


def test_a_model_of_the_hub_is_named_as_the_base(run: Path, tmp_path: Path) -> None:
    """Its own card cannot be fetched here: the hub is out of reach, and nothing is in the cache."""
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["model"]["path"] = "microsoft/Phi-3-vision-128k-instruct"
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    card = card_of(run, tmp_path / "out")
    assert ModelCard(card).data.base_model == "microsoft/Phi-3-vision-128k-instruct"
    assert "path: microsoft/Phi-3-vision-128k-instruct" in card
    assert "fine-tuned from `microsoft/Phi-3-vision-128k-instruct`." in card
    assert "No license of the base is known here." in card
    assert read(tmp_path / "out" / "config.json") == {}


def test_a_folder_that_has_gone_is_no_model_of_the_hub() -> None:
    for place in ("/mnt/models/base", "./base", "~/base", "../models/base"):
        assert not is_hub_name(place) and told(place) == "base"
    assert is_hub_name("owner/name") and told("owner/name") == "owner/name"
