"""A run becomes a Hugging Face folder; the commands that make it and ask it, as users call them."""

import json
import runpy
import shutil
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

import phi3v.export
from phi3v.config import dump_yaml
from phi3v.data import Dataset
from phi3v.errors import CheckpointError, ConfigError, Phi3VError
from phi3v.evaluation.ask import ask
from phi3v.export import export, read_run
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.processing import Phi3VProcessor
from tests.commands import LAUNCH, last_line, python, run

pytestmark = pytest.mark.slow

STEPS = 3
TOWER = "model.vision_embed_tokens.img_processor.vision_model."
COPIED = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
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


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the base that a test may edit; `run_on` makes runs that start from it."""
    shutil.copytree(tiny_model, tmp_path / "base")
    return tmp_path / "base"


def run_on(base: Path, trained: Path, out: Path) -> Path:
    """The trained run, as if it had started from another copy of the base."""
    cfg = read_run(trained)
    out.mkdir()
    (out / "checkpoints").symlink_to(trained / "checkpoints")
    moved = replace(cfg, model=replace(cfg.model, path=str(base)))
    (out / "config.yaml").write_text(dump_yaml(moved), encoding="utf-8")
    return out


def command(name: str, *arguments: object, cwd: Path) -> Any:
    return run(sys.executable, LAUNCH / name, *arguments, cwd=cwd)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def checkpoint_weights(trained: Path, step: int) -> dict[str, Tensor]:
    folder = str(trained / "checkpoints")
    return dict(get_fp32_state_dict_from_zero_checkpoint(folder, tag=f"step-{step:08d}"))


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


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


def test_config_loses_what_belongs_to_another_place_or_machine(
    base: Path, trained: Path, tmp_path: Path
) -> None:
    config = read(base / "config.json")
    del config["dtype"]
    published = {"torch_dtype": "float32", "_name_or_path": "x", "unknown_to_us": [1]}
    attention = {"_attn_implementation": "flash_attention_2"}
    (base / "config.json").write_text(json.dumps(config | published | attention))
    export(run_on(base, trained, tmp_path / "run"), tmp_path / "out", dtype="bf16")
    expected = config | {"torch_dtype": "bfloat16", "unknown_to_us": [1]}
    assert read(tmp_path / "out" / "config.json") == expected
    assert {tensor.dtype for tensor in weights_of(tmp_path / "out").values()} == {torch.bfloat16}


def test_the_half_precision_export_is_the_rounded_checkpoint(trained: Path, tmp_path: Path) -> None:
    export(trained, tmp_path / "out", step=2, dtype="bf16")
    expected = checkpoint_weights(trained, 2)
    for name, tensor in weights_of(tmp_path / "out").items():
        assert torch.equal(tensor, expected[name].bfloat16()), name
    assert read(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"


def test_generation_ends_with_the_tokens_that_end_an_answer(exported: Path) -> None:
    tokenizer = Phi3VProcessor.from_pretrained(exported).tokenizer
    start, end, text_end = tokenizer.convert_tokens_to_ids(["<s>", "<|end|>", "<|endoftext|>"])
    assert read(exported / "generation_config.json") == {
        "bos_token_id": start,
        "eos_token_id": [end, text_end],
        "pad_token_id": text_end,
    }


def test_tokenizer_and_processor_are_copied_byte_for_byte(exported: Path, tiny_model: Path) -> None:
    for name in COPIED:
        assert (exported / name).read_bytes() == (tiny_model / name).read_bytes()
    written = {path.name for path in exported.iterdir()}
    own = {"config.json", "generation_config.json", "model.safetensors", "phi3v_export.json"}
    assert written == {*COPIED, *own}


def test_whoever_may_read_the_config_may_read_the_weights(exported: Path) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) for path in exported.iterdir()}
    assert len(modes) == 1


def test_the_reloaded_model_computes_the_checkpoints_logits_bit_for_bit(
    exported: Path, trained: Path, tiny_shards: Path, catalogue: Path
) -> None:
    memory = Phi3VForCausalLM(Phi3VConfig.from_pretrained(exported))
    memory.load_state_dict(checkpoint_weights(trained, STEPS))
    reloaded = AutoModelForCausalLM.from_pretrained(exported)
    assert type(AutoConfig.from_pretrained(exported)) is Phi3VConfig
    with Image.open(min((catalogue / "images").iterdir())) as picture:
        inputs = AutoProcessor.from_pretrained(exported)(PROMPT, [picture])
    inputs.pop("num_img_tokens")
    with torch.inference_mode():
        logits = [model.eval()(**inputs).logits for model in (memory, reloaded)]
    assert torch.equal(*logits)


def test_large_weights_are_split_into_files_with_an_index(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phi3v.export, "SHARD_SIZE", "2MB")
    export(trained, tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    index = read(tmp_path / "out" / "model.safetensors.index.json")["weight_map"]
    assert set(index.values()) == files and len(files) > 1
    assert index.keys() == checkpoint_weights(trained, STEPS).keys()
    reloaded = Phi3VForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in checkpoint_weights(trained, STEPS).items():
        assert torch.equal(reloaded[name], tensor), name


# --- the code of the base ---


def add_code(base: Path, *missing: str) -> None:
    """Give the base an auto_map and its modules, as the published folders have."""
    modules = {
        "configuration_phi3_v.py": "",
        "modeling_phi3_v.py": "from .image_embedding_phi3_v import Phi3ImageEmbedding\n",
        "image_embedding_phi3_v.py": "",
        "processing_phi3_v.py": "",
        "LICENSE": "MIT",
        "sample_inference.py": "",
    }
    for name, text in modules.items():
        if name not in missing:
            (base / name).write_text(text)
    maps = {
        "config.json": {
            "AutoConfig": "configuration_phi3_v.Phi3VConfig",
            "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
        },
        "preprocessor_config.json": {"AutoProcessor": "processing_phi3_v.Phi3VProcessor"},
        "tokenizer_config.json": {"AutoTokenizer": [None, "someone/else--tokens.Fast"]},
    }
    for name, auto_map in maps.items():
        content = read(base / name) | {"auto_map": auto_map}
        (base / name).write_text(json.dumps(content), encoding="utf-8")


def test_code_that_the_base_names_comes_along(base: Path, trained: Path, tmp_path: Path) -> None:
    add_code(base)
    export(run_on(base, trained, tmp_path / "run"), tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").glob("*.py")}
    assert found == {
        "configuration_phi3_v.py",
        "modeling_phi3_v.py",
        "image_embedding_phi3_v.py",
        "processing_phi3_v.py",
    }
    assert (tmp_path / "out" / "LICENSE").read_text() == "MIT"
    assert "auto_map" in read(tmp_path / "out" / "config.json")
    for name in COPIED:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_without_its_code_an_auto_map_would_lead_nowhere_and_goes(
    base: Path, trained: Path, tmp_path: Path
) -> None:
    add_code(base, "image_embedding_phi3_v.py", "processing_phi3_v.py")
    export(run_on(base, trained, tmp_path / "run"), tmp_path / "out")
    out = tmp_path / "out"
    assert list(out.glob("*.py")) == []
    for name in ("config.json", "preprocessor_config.json"):
        expected = {key: value for key, value in read(base / name).items() if key != "auto_map"}
        assert read(out / name) == expected
    name = "tokenizer_config.json"  # its code lies in another repository
    assert (out / name).read_bytes() == (base / name).read_bytes()


# --- where it is written ---


def test_a_folder_of_the_same_run_is_replaced(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(trained, tmp_path / "out", step=2)
    (tmp_path / "out" / "old").write_text("")
    monkeypatch.chdir(trained.parent)
    export(Path("run"), tmp_path / "out")  # the same run by another name
    assert read(tmp_path / "out" / "phi3v_export.json") == {
        "run": str(trained),
        "config": "config.yaml",
        "checkpoint": "step-00000003",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "old").exists()


def test_a_folder_of_another_run_is_refused(trained: Path, exported: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    before = (exported / "phi3v_export.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        export(tmp_path / "run", exported)
    assert str(caught.value) == (
        f"--out {exported} exists and was exported from {trained}; name another folder, or remove "
        "it"
    )
    assert (exported / "phi3v_export.json").read_bytes() == before


def test_a_folder_or_file_of_the_users_own_is_refused(trained: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "thesis", tmp_path / "thesis.txt"
    folder.mkdir()
    file.write_text("words")
    (folder / "chapter.txt").write_text("more words")
    for out in (folder, file):
        with pytest.raises(ConfigError) as caught:
            export(trained, out)
        assert str(caught.value) == (
            f"--out {out} exists and is not an export; name another folder, or remove it"
        )
    assert file.read_text() == "words"
    assert [path.name for path in folder.iterdir()] == ["chapter.txt"]


def test_an_empty_folder_is_as_good_as_none(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(trained, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


# --- what cannot be exported ---


def test_a_step_that_was_not_saved_is_refused(trained: Path, tmp_path: Path) -> None:
    arguments = ("run", "--out", tmp_path / "out", "--step", 1)
    done = command("export.py", *arguments, cwd=trained.parent)
    assert done.returncode == 2
    assert last_line(done, "CheckpointError") == (
        "CheckpointError: run/checkpoints has no checkpoint of step 1, it has: 2, 3"
    )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        export(tmp_path / "none", tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path / 'none'} holds no config.yaml, so it is no run folder; name run.out"
    )


def test_a_base_that_was_exchanged_is_refused(base: Path, trained: Path, tmp_path: Path) -> None:
    config = read(base / "config.json")
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match="do not fit the model's config.json: 6 unknown: "):
        export(run_on(base, trained, tmp_path / "run"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- asking it ---


def test_a_question_with_and_without_a_picture(exported: Path, catalogue: Path) -> None:
    picture = min((catalogue / "images").iterdir())
    question = "What is shown in this image?"
    asked = ("exported", "--prompt", question, "--max_new_tokens", 6)
    for images in ([], [picture]):
        flags = ("--image", *images) if images else ()
        done = command("generate.py", *asked, *flags, cwd=exported.parent)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ask(str(exported), question, images, 6) + "\n"


def test_a_file_that_is_no_picture_is_refused_in_one_line(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("words")
    arguments = (exported, "--prompt", "What?", "--image", "notes.txt")
    done = command("generate.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert last_line(done, "ConfigError").startswith(
        "ConfigError: --image notes.txt cannot be read"
    )


def test_a_run_and_its_export_score_the_same_side_by_side(
    exported: Path, tiny_shards: Path
) -> None:
    done = command(
        "evaluate.py",
        *("run", "exported", "--shards", tiny_shards),
        *("eval.metrics=[exact_match, parse_rate]", "eval.pattern='Product: {title}'"),
        cwd=exported.parent,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line]
    lines = lines[[line[0] for line in lines].index("metric") :]
    assert [line[0] for line in lines] == ["metric", "loss", "exact_match", "parse_rate"]
    assert lines[0][1:] == ["run", "exported"]
    for line in lines[1:]:
        half = len(line[1:]) // 2
        assert line[1 : 1 + half] == line[1 + half :]
    assert "n=4" in lines[2], "the run's own eval.rows hold"


def test_a_model_that_does_not_exist_is_refused_in_one_line(
    exported: Path, tiny_shards: Path
) -> None:
    arguments = ("exported", "./none", "--shards", tiny_shards)
    done = command("evaluate.py", *arguments, cwd=exported.parent)
    assert done.returncode == 2 and done.stdout == ""
    assert "./none has no preprocessor_config.json" in last_line(done, "ConfigError")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exported", "eval.metrics=[bleu]"], "eval.metrics has 'bleu', but without a pattern "),
        (["exported", "eval.rows=0"], "eval.rows is 0, so there is nothing to evaluate; "),
        (["exported", "eval.row=1"], "unknown key 'eval.row' in override 'eval.row=1'; "),
        (["exported", "--split", "test"], "{shards} has no split 'test', it has: train, valida"),
        (["exported", "--shards", "none"], "none holds no manifest.json, so it is no dataset; "),
        (["exported", "./none"], "./none has no preprocessor_config.json; "),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_a_model_is_opened(
    exported: Path,
    tiny_shards: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    main = runpy.run_path(str(LAUNCH / "evaluate.py"))["main"]
    monkeypatch.setitem(main.__globals__, "set_environment", lambda: None)
    monkeypatch.setattr(phi3v.export, "open_any", None)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--shards", str(tiny_shards), *arguments])
    monkeypatch.chdir(exported.parent)
    with pytest.raises(Phi3VError) as caught:
        main()
    assert message.format(shards=tiny_shards) in str(caught.value)


def test_overrides_alone_name_no_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "eval.rows=1", "--shards", "none"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(LAUNCH / "evaluate.py"))["parse"]()
    assert caught.value.code == 2
    assert "error: name at least one model folder or run folder\n" in capsys.readouterr().err


def test_the_run_reports_its_own_evaluation(trained: Path, tiny_shards: Path) -> None:
    lines = (trained / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    data = Dataset(tiny_shards, "validation")
    outcomes = [json.loads(line) for line in lines]
    assert len(outcomes) == 4
    for outcome in outcomes:
        assert outcome["reference"] == data[outcome["row"]].meta["reference"]
    assert read(trained / "summary.json")["metrics"]["exact_match"]["n"] == 4
