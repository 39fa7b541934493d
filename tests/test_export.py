"""A run becomes a Hugging Face folder; the commands that make it and ask it, as users call them."""

import json
import runpy
import shutil
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

import phi3v.export
from phi3v.config.running import EvalSection
from phi3v.data import Dataset
from phi3v.errors import ConfigError, Phi3VError
from phi3v.evaluation.ask import Asker
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.processing import Phi3VProcessor
from tests.commands import LAUNCH, last_line, python, run
from tests.export.runs import read, weights_of

pytestmark = pytest.mark.slow

STEPS = 3
TOWER = "model.vision_embed_tokens.img_processor.vision_model."
COPIED = ("tokenizer.json", "tokenizer_config.json")
PREPROCESSOR = "preprocessor_config.json"
PROMPT = "<|user|>\n<|image_1|>\nWhat is shown in this image?<|end|>\n<|assistant|>\n"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path, tiny_model: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "run.yaml"
    values = {
        "run": {"out": "run"},
        "model": {"path": str(tiny_model)},
        "data": {"shards": str(tiny_shards), "max_tokens": 264, "max_views": 32},
        "optim": {"lr": 2e-3, "schedule": "constant"},
        "train": {"max_steps": STEPS},
        "eval": {"rows": 4, "metrics": ["exact_match"], "max_new_tokens": 8},
        "checkpoint": {"every": 2},
    }
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """A run of three steps on one rank, checkpoints of steps 2 and 3."""
    cwd = tmp_path_factory.mktemp("trained")
    done = run(*python(recipe), cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "run"


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    """The folder that the command writes from it."""
    done = command("export.py", "run", "--out", "exported", cwd=trained.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "exported and verified: exported"
    return trained.parent / "exported"


def command(name: str, *arguments: object, cwd: Path) -> Any:
    return run(sys.executable, LAUNCH / name, *arguments, cwd=cwd)


def checkpoint_weights(trained: Path, step: int) -> dict[str, Tensor]:
    folder = str(trained / "checkpoints")
    return dict(get_fp32_state_dict_from_zero_checkpoint(folder, tag=f"step-{step:08d}"))


# --- what the folder holds ---


def test_weights_have_the_published_names_and_no_others(exported: Path, tiny_model: Path) -> None:
    assert weights_of(exported).keys() == weights_of(tiny_model).keys()
    names = set(weights_of(exported))
    assert {"lm_head.weight", "model.layers.0.mlp.gate_up_proj.weight"} < names
    assert {f"{TOWER}post_layernorm.bias", f"{TOWER}pre_layrnorm.weight"} < names
    assert not any("wte" in name or "inv_freq" in name or "position_ids" in name for name in names)


def test_weights_are_the_checkpoints_float32_weights(exported: Path, trained: Path) -> None:
    expected = checkpoint_weights(trained, STEPS)
    found = weights_of(exported)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name


def test_what_is_trained_has_moved_and_the_unused_layer_has_not(
    exported: Path, tiny_model: Path
) -> None:
    before, after = weights_of(tiny_model), weights_of(exported)
    still = {name for name in before if torch.equal(before[name], after[name])}
    unused = {n for n in before if n.startswith((f"{TOWER}encoder.layers.3.", f"{TOWER}post_"))}
    assert still == unused != set()


def test_config_differs_from_the_bases_only_where_it_must(exported: Path, tiny_model: Path) -> None:
    assert read(exported / "config.json") == read(tiny_model / "config.json")


def test_the_tokenizer_is_copied_byte_for_byte_and_the_processor_told_of_the_runs_pictures(
    exported: Path, tiny_model: Path
) -> None:
    for name in COPIED:
        assert (exported / name).read_bytes() == (tiny_model / name).read_bytes()
    written = {path.name for path in exported.iterdir()}
    own = {"config.json", "generation_config.json", "model.safetensors", "phi3v_export.json"}
    own |= {"README.md", PREPROCESSOR}
    rules = {"never_upscale": False, "alpha": "white", "exif": "apply"}
    assert read(exported / PREPROCESSOR) == read(tiny_model / PREPROCESSOR) | {"phi3v": rules}
    assert written == {*COPIED, *own}


def test_the_card_tells_the_scores_of_the_runs_last_evaluation(
    exported: Path, trained: Path
) -> None:
    card = (exported / "README.md").read_text(encoding="utf-8")
    score = read(trained / "summary.json")["metrics"]["exact_match"]
    low, value, high = (f"{score[key]:.1%}" for key in ("low", "value", "high"))
    assert f"| exact_match | {value} [{low}, {high}] |" in card
    assert read(trained / "data.json")["fingerprint"] in card
    assert (
        f"# Phi-3-Vision fine-tuned: run, step {STEPS}\n" in card
        and str(trained.parent) not in card
    )


def test_the_reloaded_model_computes_the_checkpoints_logits_bit_for_bit(
    exported: Path, trained: Path, tiny_shards: Path, catalogue: Path
) -> None:
    memory = Phi3VForCausalLM(Phi3VConfig.from_pretrained(exported))
    memory.load_state_dict(checkpoint_weights(trained, STEPS))
    reloaded = AutoModelForCausalLM.from_pretrained(exported)
    assert type(AutoConfig.from_pretrained(exported)) is Phi3VConfig
    with Image.open(min((catalogue / "images").iterdir())) as picture:
        inputs = AutoProcessor.from_pretrained(exported)(PROMPT, [picture])
    with torch.inference_mode():
        logits = [model.eval()(**inputs).logits for model in (memory, reloaded)]
    assert torch.equal(*logits)


# --- what cannot be exported ---


def test_a_step_that_was_not_saved_is_refused(trained: Path, tmp_path: Path) -> None:
    arguments = ("run", "--out", tmp_path / "out", "--step", 1)
    done = command("export.py", *arguments, cwd=trained.parent)
    assert done.returncode == 2
    assert last_line(done, "CheckpointError") == (
        "CheckpointError: run/checkpoints has no checkpoint of step 1, it has: 2, 3"
    )
    assert not (tmp_path / "out").exists()


# --- asking it ---


def test_a_question_about_a_picture(exported: Path, catalogue: Path) -> None:
    picture = min((catalogue / "images").iterdir())
    question = "What is shown in this image?"
    asked = ("exported", "--prompt", question, "--max_new_tokens", 6, "--image", picture)
    done = command("generate.py", *asked, cwd=exported.parent)
    assert done.returncode == 0, done.stderr
    settings = EvalSection(max_new_tokens=6, batch_rows=1)
    generator = phi3v.export.open_any(str(exported), settings)
    asker = Asker(generator, Phi3VProcessor.from_pretrained(exported))
    assert done.stdout == asker.ask(question, [picture]) + "\n"


def test_a_file_that_is_no_picture_is_refused_in_one_line(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("words")
    arguments = (exported, "--prompt", "What?", "--image", "notes.txt")
    done = command("generate.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    said = "--image: image cannot be read: notes.txt, cannot identify image file, it is a text"
    assert last_line(done, "ConfigError") == f"ConfigError: {said}; name another"


def test_private_without_push_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["export.py", "run", "--out", "out", "--private"])
    with pytest.raises(ConfigError, match="--private is for --push, which is not given; add it, "):
        runpy.run_path(str(LAUNCH / "export.py"))["parse"]()


@pytest.mark.parametrize("name", ["generate.py", "export.py"])
def test_every_argument_has_a_help_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(parser: ArgumentParser) -> NoReturn:
        raise SystemExit([action.dest for action in parser._actions if not action.help])

    monkeypatch.setattr(ArgumentParser, "parse_args", leave)
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(LAUNCH / name))["parse"]()
    assert caught.value.code == []


def test_a_run_and_its_export_score_the_same_side_by_side(
    exported: Path, tiny_shards: Path
) -> None:
    done = command(
        "evaluate.py",
        *("exported", "run", "--shards", tiny_shards, "--out", "scores.json"),
        *("eval.metrics=[exact_match, parse_rate]", "eval.pattern='Product: {title}'"),
        cwd=exported.parent,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line]
    lines = lines[[line[0] for line in lines].index("metric") :]
    scores, differences = lines[:4], lines[4:]
    assert [line[0] for line in scores] == ["metric", "loss", "exact_match", "parse_rate"]
    assert scores[0][1:] == ["exported", "run"]
    for line in scores[1:]:
        half = len(line[1:]) // 2
        assert line[1 : 1 + half] == line[1 + half :]
    assert "n=4" in scores[2], "the run's own eval.rows hold"
    assert differences[0] == ["run", "-", "exported", "difference"]
    assert [line[0] for line in differences[1:]] == ["exact_match", "parse_rate"]
    assert all(line[-3:] == ["no", "difference", "seen"] for line in differences[1:])
    written = read(exported.parent / "scores.json")["models"]
    assert written["run"] == written["exported"] and len(written["run"]["answers"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exported", "eval.metrics=[blue]"], "eval.metrics has 'blue', which is no metric; "),
        (["exported", "unfinished"], "unfinished/checkpoints holds no checkpoint; "),
        (["exported", "eval.pattern='Price: {price:float}'"], "; correct eval.pattern, or the ass"),
        (["exported", "eval.rows=0"], "eval.rows is 0, so there is nothing to evaluate; "),
        (["exported", "eval.row=1"], "unknown key 'eval.row' in override 'eval.row=1'; "),
        (["exported", "--split", "test"], "{shards} has no split 'test', it has: train, valida"),
        (["exported", "--shards", "none"], "none holds no manifest.json, so it is no dataset; "),
        (["exported", "./none"], "there is no folder ./none, and "),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_a_model_is_opened(
    exported: Path,
    trained: Path,
    tiny_shards: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unfinished = trained.parent / "unfinished"
    unfinished.mkdir(exist_ok=True)
    shutil.copy(trained / "config.yaml", unfinished)
    main = runpy.run_path(str(LAUNCH / "evaluate.py"))["main"]
    monkeypatch.setitem(main.__globals__, "set_environment", lambda: None)
    monkeypatch.setattr(phi3v.export, "open_any", None)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--shards", str(tiny_shards), *arguments])
    monkeypatch.chdir(exported.parent)
    with pytest.raises(Phi3VError) as caught:
        main()
    assert message.format(shards=tiny_shards) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval.rows=1"], "no MODEL is named, only settings; "),
        (["a", "a"], "a is named twice; "),
        (["a", "--out", "none/b"], "--out none/b: there is no folder none; make it"),
    ],
)
def test_what_cannot_be_asked_is_refused_at_once(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = runpy.run_path(str(LAUNCH / "evaluate.py"))["main"]
    monkeypatch.setitem(main.__globals__, "set_environment", lambda: None)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments, "--shards", "none"])
    with pytest.raises(ConfigError) as caught:
        main()
    assert str(caught.value).startswith(message)


def test_the_run_reports_its_own_evaluation(trained: Path, tiny_shards: Path) -> None:
    lines = (trained / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    data = Dataset(tiny_shards, "validation")
    outcomes = [json.loads(line) for line in lines]
    assert len(outcomes) == 4
    for outcome in outcomes:
        assert outcome["reference"] == data[outcome["row"]].meta["reference"]
    assert read(trained / "summary.json")["metrics"]["exact_match"]["n"] == 4
