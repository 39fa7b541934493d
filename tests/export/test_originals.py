"""What surrounds the weights is the base's own, in the forms that other programs read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoProcessor

from phi3v.errors import CheckpointError, ConfigError
from phi3v.export import originals
from phi3v.export.opening import base_of
from phi3v.export.originals import write_originals, write_text_originals
from phi3v.export.target import ORIGIN
from phi3v.export.weights import SHARD_BYTES, file_names, plan_shards
from phi3v.files import write_json
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.processing import Phi3VImageProcessor, Phi3VProcessor
from tests.export.runs import read
from tests.parity.goldens import REFERENCE, needs_reference

VARIANTS = ("phi3_vision", "phi35_vision")
CODE = {
    "configuration_phi3_v.py": "",
    "modeling_phi3_v.py": "from .image_embedding_phi3_v import Phi3ImageEmbedding\n",
    "image_embedding_phi3_v.py": "",
    "image_processing_phi3_v.py": "",
    "processing_phi3_v.py": "",
}
MAPS: dict[str, dict[str, Any]] = {
    "config.json": {
        "AutoConfig": "configuration_phi3_v.Phi3VConfig",
        "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
    },
    "preprocessor_config.json": {"AutoProcessor": "processing_phi3_v.Phi3VProcessor"},
    "tokenizer_config.json": {"AutoTokenizer": [None, "someone/else--tokens.Fast"]},
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(read(path) | values), encoding="utf-8")


def add_code(base: Path, *missing: str) -> None:
    """Give the base an auto_map and its modules, as the published folders have."""
    for name, text in CODE.items():
        if name not in missing:
            (base / name).write_text(text)
    for name, auto_map in MAPS.items():
        edit(base / name, auto_map=auto_map)


def test_config_loses_what_belongs_to_another_place_or_machine(base: Path, out: Path) -> None:
    config = read(base / "config.json")
    del config["dtype"], config["num_key_value_heads"]
    published = {"torch_dtype": "float32", "_name_or_path": "x", "unknown_to_us": [1]}
    attention = {"_attn_implementation": "flash_attention_2"}
    (base / "config.json").write_text(json.dumps(config | published | attention))
    write_originals(str(base), out, torch.bfloat16)
    added = {"torch_dtype": "bfloat16", "unknown_to_us": [1], "num_key_value_heads": 4}
    assert read(out / "config.json") == config | added


def test_the_files_of_the_base_come_along_byte_for_byte(base: Path, out: Path) -> None:
    for name in ("LICENSE", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja"):
        (base / name).write_text("{}" if name.endswith(".json") else name)
    (base / "adapter_config.json").write_text("{}")
    write_originals(str(base), out, torch.float32)
    copied = {path.name for path in out.iterdir()} - {"config.json", "generation_config.json"}
    left = {"adapter_config.json", "config.json", "generation_config.json", "model.safetensors"}
    assert copied == {path.name for path in base.iterdir()} - left
    for name in copied:
        assert (out / name).read_bytes() == (base / name).read_bytes()


def test_generation_ends_with_the_tokens_that_end_an_answer(base: Path, out: Path) -> None:
    write_originals(str(base), out, torch.float32)
    tokenizer = Phi3VProcessor.from_pretrained(base).tokenizer
    start, end, text_end = tokenizer.convert_tokens_to_ids(["<s>", "<|end|>", "<|endoftext|>"])
    expected = {"bos_token_id": start, "eos_token_id": [end, text_end], "pad_token_id": text_end}
    assert read(out / "generation_config.json") == expected


def test_code_that_the_base_names_comes_along(
    base: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_code(base)
    (base / "sample_inference.py").write_text("")
    write_originals(str(base), out, torch.float32)
    named = set(CODE) - {"image_processing_phi3_v.py"}
    assert {path.name for path in out.glob("*.py")} == named
    for name, auto_map in MAPS.items():
        assert read(out / name)["auto_map"] == auto_map
    assert capsys.readouterr().err == ""


def test_without_its_code_an_auto_map_would_lead_nowhere_and_goes(
    base: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_code(base, "image_embedding_phi3_v.py", "processing_phi3_v.py")
    write_originals(str(base), out, torch.float32)
    assert list(out.glob("*.py")) == []
    for name in ("config.json", "preprocessor_config.json"):
        expected = {key: value for key, value in read(base / name).items() if key != "auto_map"}
        assert read(out / name) == expected
    assert capsys.readouterr().err == (
        f"auto_map is left out of config.json, preprocessor_config.json, because {base} has no "
        "image_embedding_phi3_v.py, no processing_phi3_v.py; vLLM and transformers then open the "
        "folder where phi3v is installed, and nowhere else\n"
    )
    name = "tokenizer_config.json"  # its code lies in another repository
    assert (out / name).read_bytes() == (base / name).read_bytes()


def test_the_text_half_is_what_llama_cpp_reads(
    base: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(base / "config.json", auto_map=MAPS["config.json"])
    write_text_originals(str(base), out, torch.bfloat16)
    config, theirs = read(out / "config.json"), read(base / "config.json")
    assert (config["architectures"], config["model_type"]) == (["Phi3ForCausalLM"], "phi3")
    gone = {"auto_map", "img_processor", "embd_layer", "vision_config"}
    assert config.keys() == theirs.keys() - gone
    assert "has no tokenizer.model, which llama.cpp's converter needs; " in capsys.readouterr().err
    assert not (out / "preprocessor_config.json").exists()
    assert base_of(str(out)) == str(out)  # somebody's folder, not an export
    write_json(out / ORIGIN, {})
    with pytest.raises(ConfigError, match="out is the text half of a model, .* for llama.cpp"):
        base_of(str(out))
    write_json(base / ORIGIN, {})
    assert base_of(str(base)) == str(base)


def test_a_base_without_its_config_is_refused(base: Path, out: Path) -> None:
    (base / "config.json").unlink()
    with pytest.raises(ConfigError, match="base has no config.json; it must be there to export"):
        write_originals(str(base), out, torch.float32)


# --- the published folders ---


@needs_reference
@pytest.mark.parametrize("variant", VARIANTS)
def test_of_a_published_folder_only_what_may_change_does(variant: str, out: Path) -> None:
    """The reference has no .py files, so the auto_maps go; all else is said in one place."""
    base = REFERENCE / variant
    write_originals(str(base), out, torch.bfloat16)
    before, after = read(base / "config.json"), read(out / "config.json")
    gone = {"_attn_implementation", "_name_or_path", "auto_map"}
    assert after == {key: value for key, value in before.items() if key not in gone}
    assert after["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}
    assert not any("auto_map" in read(path) for path in out.glob("*.json"))
    generation = {"bos_token_id": 1, "eos_token_id": [32007, 32000], "pad_token_id": 32000}
    assert read(out / "generation_config.json") == generation
    for path in set(base.glob("*.json")) - {base / "config.json", base / "generation_config.json"}:
        if "auto_map" not in read(path) and "index" not in path.name and "shapes" not in path.name:
            assert (out / path.name).read_bytes() == path.read_bytes()
    assert (out / "tokenizer.json").is_file()


@needs_reference
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_auto_classes_open_a_published_folder_with_our_classes(variant: str, out: Path) -> None:
    """Above all AutoProcessor, which gives the bare tokenizer where nobody has registered."""
    write_originals(str(REFERENCE / variant), out, torch.bfloat16)
    for folder in (out, REFERENCE / variant):  # without auto_map, and with one that is not used
        processor = AutoProcessor.from_pretrained(folder)
        assert type(processor) is Phi3VProcessor
        assert processor.num_crops == {"phi3_vision": 16, "phi35_vision": 4}[variant]
        assert type(AutoImageProcessor.from_pretrained(folder)) is Phi3VImageProcessor


@needs_reference
def test_names_shapes_and_files_are_the_published() -> None:
    folder = REFERENCE / "phi3_vision"
    with torch.device("meta"):
        model = Phi3VForCausalLM(Phi3VConfig.from_pretrained(folder))
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    assert shapes == read(folder / "param_shapes.json") and len(shapes) == 592
    index = read(folder / "model.safetensors.index.json")
    assert index["weight_map"].keys() == shapes.keys()
    sizes = {name: 2 * p.numel() for name, p in model.named_parameters()}
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    names = file_names(len(plan_shards(sizes, SHARD_BYTES)))
    assert set(names) == set(index["weight_map"].values())


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the user's own, beside the base."""
    (tmp_path / "secret.py").write_text("PASSWORD = 'hunter2'\n")
    return tmp_path / "secret.py"


@pytest.mark.parametrize("module", ["{}/secret", "../secret", "sub/../../secret", "linked", 7, {}])
def test_an_auto_map_brings_no_file_from_outside_of_the_base(
    module: Any, base: Path, out: Path, secret: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (base / "linked.py").symlink_to(secret)
    named = f"{module.format(secret.parent)}.X" if isinstance(module, str) else module or {"": 1}
    edit(base / "config.json", auto_map={"AutoX": named})
    write_originals(str(base), out, torch.float32)
    assert list(out.rglob("*.py")) == []
    assert "auto_map" not in read(out / "config.json")
    assert capsys.readouterr().err.startswith("auto_map is left out of config.json, because ")


@pytest.mark.parametrize(
    "line", ["import ./secret", "import .{}/secret", "from .../secret import x"]
)
def test_nor_does_what_its_modules_import(line: str, base: Path, out: Path, secret: Path) -> None:
    (base / "own.py").write_text(f"{line.format(secret.parent)}\n")
    edit(base / "config.json", auto_map={"AutoX": "own.X"})
    write_originals(str(base), out, torch.float32)
    assert list(out.rglob("*.py")) == []


def test_a_file_that_is_a_link_to_another_is_not_published(
    base: Path, out: Path, secret: Path
) -> None:
    (base / "LICENSE").symlink_to(secret)
    with pytest.raises(ConfigError, match=f"^{base}/LICENSE is a link to {secret}, which would be"):
        write_originals(str(base), out, torch.float32)


def test_a_folder_of_links_to_a_base_or_of_the_hubs_cache_is_one(
    base: Path, out: Path, tmp_path: Path
) -> None:
    blobs, cached = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "1"
    links = tmp_path / "links"
    for folder in (blobs, cached, links):
        folder.mkdir(parents=True)
    for number, file in enumerate(base.iterdir()):
        shutil.copyfile(file, blobs / str(number))
        (cached / file.name).symlink_to(blobs / str(number))
        (links / file.name).symlink_to(file)
    for folder in (cached, links):
        write_originals(str(folder), out, torch.float32)
        assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", ["/etc/x.safetensors", "../x.safetensors"])
def test_an_index_that_names_weights_elsewhere_is_refused(base: Path, name: str) -> None:
    index = {"weight_map": {"lm_head.weight": name}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"names '{name}', which is not in its folder; "):
        Phi3VForCausalLM.from_pretrained(base)


def test_nothing_but_a_plain_name_is_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(originals, "find_base", lambda model, name: asked.append(name))
    maps = {"A": "../secret.X", "B": ["/home/me/secret.X", "own.X", "some/one--x.X"]}
    assert dict(originals._code_files("some/one", maps)).keys() == {
        *("../secret", "/home/me/secret", "own")
    }
    assert asked == ["own.py"]
