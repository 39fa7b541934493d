"""README.md of an export, a model card: what it is, how it is loaded, what it was made of.

Everything is read from the run's own records. Folders appear by their names, never by a path of the
machine that trained.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from phi3v.config import RunConfig, to_dict
from phi3v.evaluation.metrics import describe, is_rate
from phi3v.evaluation.metrics.names import BLIND, CONSTANT, controls
from phi3v.evaluation.report.words import interval_fault
from phi3v.export.opening import read_run
from phi3v.export.originals import find_base
from phi3v.files import write_text
from phi3v.pictures import PictureSettings
from phi3v.training.run_folder import DATA, ENVIRONMENT, RunFolder

OF_WHOLE = ("library_name", "pipeline_tag")  # keys that do not hold for the text half
INHERITED = ("license", "license_name", "license_link", "language")  # of the base's own card
PLACES = (
    "run.out",
    "model.path",
    "deepspeed",
    "deepspeed.cpu",
    "deepspeed.cuda",
)  # keys of a recipe that hold one path
# Sections that say how a run was watched and kept, not what it learned.
UNTOLD = ("checkpoint", "debug", "faults", "tracking", "wandb")
# As docs/serving.md has it.
PYTHON = """\
import phi3v  # registers the classes; trust_remote_code is not needed
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained("DIR", dtype="auto")
processor = AutoProcessor.from_pretrained("DIR")
prompt = "<|user|>\\n<|image_1|>\\nWhat is shown in this image?<|end|>\\n<|assistant|>\\n"
inputs = processor(prompt, [Image.open("picture.jpg")])
ids = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
TEXT_HALF = """\
Its language model alone, without the vision tower and the projector, as llama.cpp's converter reads
it. transformers does not load it, and pictures cannot be shown to it.

## Converting

The converter reads tokenizer.model; where the folder has none, copy that of Phi-3-mini into it.

```
python convert_hf_to_gguf.py DIR
```"""


def write_card(run: Path, manifest: Mapping[str, Any], out: Path) -> None:
    """Write the card of a checkpoint of a run beside the config.json of its export.

    manifest  of the checkpoint
    """
    cfg, folder = read_run(run), RunFolder(run)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    parts = [
        _head(_front_matter(cfg.model.path), run, manifest),
        f"Phi-3-Vision, fine-tuned in all its parameters from {_base_name(cfg.model.path)}.",
        f"## Loading\n\n```python\n{PYTHON}```\n\n{_serving(config)}",
        _evaluation(folder, manifest["step"]),
        _data(cfg, folder, manifest, _pictures(out)),
        _making(folder, manifest),
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(shareable(cfg), sort_keys=False, width=90)}```",
    ]
    write_text(out / "README.md", "\n\n".join(parts) + "\n")


def write_text_card(run: Path, manifest: Mapping[str, Any], out: Path) -> None:
    """Write the card of the text half: what it is, and what to do with it."""
    base = read_run(run).model.path
    front = {k: v for k, v in _front_matter(base).items() if k not in OF_WHOLE}
    parts = [
        _head(front, run, manifest),
        f"Phi-3-Vision, fine-tuned in all its parameters from {_base_name(base)}: the text half.",
        TEXT_HALF,
        _making(RunFolder(run), manifest),
    ]
    write_text(out / "README.md", "\n\n".join(parts) + "\n")


def _head(front: Mapping[str, Any], run: Path, manifest: Mapping[str, Any]) -> str:
    told = yaml.safe_dump(dict(front), sort_keys=False)
    name = f"Phi-3-Vision fine-tuned: {run.resolve().name}, step {manifest['step']}"
    return f"---\n{told}---\n\n# {name}"


def _front_matter(base: str) -> dict[str, Any]:
    """What the hub reads; `base_model` only where the base is one of the hub's."""
    card = find_base(base, "README.md")
    theirs = (metadata_load(card) if card else None) or {}
    inherited = {key: theirs[key] for key in INHERITED if key in theirs}
    return {
        **({} if Path(base).is_dir() else {"base_model": base}),
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": "unknown",
        **inherited,
        "tags": ["phi3_v"],
    }


def _base_name(base: str) -> str:
    return f"a folder `{Path(base).name}`" if Path(base).is_dir() else f"`{base}`"


def _serving(config: Mapping[str, Any]) -> str:
    """What else serves the folder, which depends on whether the base's code came along."""
    if "vision_config" in config:
        return (
            "Other programs take the vision tower for ViT-L/14-336, which this model does not have."
        )
    if "auto_map" in config:
        return "vLLM: `vllm serve DIR --trust-remote-code` (the base's code is in the folder)."
    return (
        "vLLM: `vllm serve DIR` where phi3v is installed, which registers itself as a plugin; the "
        "folder has no code of its own for `--trust-remote-code`."
    )


def _evaluation(folder: RunFolder, step: int) -> str:
    found = [entry for entry in folder.read_evaluations() if entry["step"] == step]
    if not found:
        return f"## Evaluation\n\nStep {step} was not evaluated during the run."
    (entry,) = found
    metrics = entry["metrics"]
    loss = "" if entry["loss"] is None else f"Held-out loss {entry['loss']:.4f}. "
    of_others = controls(metrics)
    rows = [_score_row(name, metrics) for name in metrics if name not in of_others]
    head = (
        "| metric | value [95 % interval] | blind control | constant answer | rows | what it is |"
    )
    return (
        f"## Evaluation\n\n{loss}Answers to held-out rows; in the blind control the pictures were "
        "exchanged; the constant answer is the most frequent one of training.\n\n"
        f"{head}\n|---|---|---|---|---|---|\n" + "\n".join(rows)
    )


def _score_row(name: str, metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The blind control is of fewer rows where some have no picture, so it has its own number."""
    blind = metrics.get(BLIND + name)
    cells = (
        name,
        _show(name, metrics[name]),
        _show(name, blind) + (f" n={blind['n']}" if blind else ""),
        _show(name, metrics.get(CONSTANT + name)),
        str(metrics[name]["n"]),
        _cell(describe(name)),
    )
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """A text in a table of Markdown, where a bare | would begin the next cell."""
    return text.replace("|", "\\|")


def _show(name: str, score: Mapping[str, Any] | None) -> str:
    if score is None or score["value"] is None:
        return "-"
    form = ".1%" if is_rate(name) else ".4g"
    value, *interval = (
        "-" if score[key] is None else format(score[key], form) for key in ("value", "low", "high")
    )
    fault = interval_fault(name, score["low"], score["high"], score["n"])
    return f"{value} [{interval[0]}, {interval[1]}]" + (f" ({fault})" if fault else "")


def _pictures(out: Path) -> str:
    """How pictures are shown, which other programs take only part of."""
    path = out / "preprocessor_config.json"
    if not path.is_file():
        return ""
    settings = PictureSettings.from_preprocessor(_read(path), path.name)
    return (
        f"Pictures: {settings} (preprocessor_config.json; other programs read num_crops alone).\n"
    )


def _data(cfg: RunConfig, folder: RunFolder, manifest: Mapping[str, Any], pictures: str) -> str:
    data = _read(folder.path / DATA)
    parts = ", ".join(
        f"`{Path(part.path).name}` (weight {part.weight:g})" for part in cfg.data.parts
    )
    counts = ("samples", "tokens", "label_tokens", "image_tokens", "views")
    rows = [f"| {name.replace('_', ' ')} | {data[name]:,} |" for name in counts if name in data]
    fingerprint = manifest["fingerprints"]["data"]
    return (
        f"## Data\n\nDatasets: {parts}.\nFingerprint: `{fingerprint}`.\n{pictures}\n"
        "| training split | |\n|---|---|\n" + "\n".join(rows)
    )


def _making(folder: RunFolder, manifest: Mapping[str, Any]) -> str:
    environment = _read(folder.path / ENVIRONMENT)
    lines = [
        f"- ranks: {manifest['world_size']}, ZeRO stage {manifest['zero_stage']}, on "
        f"{environment.get('device', 'an unknown device')}",
        *_versions(manifest),
        f"- commit of phi3v: {environment.get('commit') or 'unknown'}",
        f"- saved: {manifest['saved_at'][:19]}Z",  # UTC, to the second
    ]
    return "## Training\n\n" + "\n".join(lines)


def _versions(manifest: Mapping[str, Any]) -> Iterator[str]:
    named = {name: version for name, version in manifest["versions"].items() if version}
    yield "- versions: " + ", ".join(f"{name} {version}" for name, version in named.items())


def shareable(cfg: RunConfig) -> dict[str, Any]:
    """What of the resolved recipe made the model, with folders by their names."""
    tree = to_dict(cfg)
    for key in PLACES:
        *sections, name = key.split(".")
        values: Any = tree
        for section in sections:
            values = values[section]
        place = values.get(name) if isinstance(values, dict) else None
        if isinstance(place, str) and (name != "path" or Path(place).is_dir()):
            values[name] = Path(place).name
    shareable_tree: dict[str, Any] = _without_paths(tree)
    shards = [{"path": Path(p.path).name, "weight": p.weight} for p in cfg.data.parts]
    shareable_tree["data"]["shards"] = shards
    told = {key: value for key, value in shareable_tree.items() if key not in UNTOLD}
    return dict(_without_nulls(told))


def _without_nulls(value: Any) -> Any:
    """A tree without the keys that are not set."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _without_paths(value: Any) -> Any:
    """A tree in which no text is an absolute path."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(item) for item in value]
    is_path = isinstance(value, str) and value.startswith(("/", "~")) and "\n" not in value
    return Path(value).name if is_path else value


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found
