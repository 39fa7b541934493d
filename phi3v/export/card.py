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
from phi3v.export.opening import read_run
from phi3v.export.originals import find_base
from phi3v.files import write_text
from phi3v.training.run_folder import DATA, ENVIRONMENT, RunFolder

BLIND = "blind_"
INHERITED = ("license", "license_name", "license_link", "language")  # of the base's own card
PLACES = ("run.out", "model.path", "deepspeed")  # keys of a recipe that hold one path


def write_card(run: Path, manifest: Mapping[str, Any], out: Path) -> None:
    """Write the card of a checkpoint of a run beside the config.json of its export.

    manifest  of the checkpoint
    """
    cfg, folder = read_run(run), RunFolder(run)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    front = yaml.safe_dump(_front_matter(cfg.model.path), sort_keys=False)
    parts = [
        f"---\n{front}---\n\n# {run.resolve().name}, step {manifest['step']}",
        f"Phi-3-Vision, fine-tuned in all its parameters from {_base_name(cfg.model.path)}.",
        _loading(config),
        _evaluation(folder, manifest["step"]),
        _data(cfg, folder, manifest),
        _making(folder, manifest),
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(shareable(cfg), sort_keys=False, width=90)}```",
    ]
    write_text(out / "README.md", "\n\n".join(parts) + "\n")


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


def _loading(config: Mapping[str, Any]) -> str:
    """How the folder is loaded, which depends on whether the base's code came along."""
    python = (
        "import phi3v  # registers the classes; no remote code is needed\n"
        "from transformers import AutoModelForCausalLM, AutoProcessor\n\n"
        'model = AutoModelForCausalLM.from_pretrained("DIR", dtype="auto")\n'
        'processor = AutoProcessor.from_pretrained("DIR")'
    )
    return f"## Loading\n\n```python\n{python}\n```\n\n{_serving(config)}"


def _serving(config: Mapping[str, Any]) -> str:
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
    rows = [
        f"| {name} | {_show(name, score)} | {_show(name, metrics.get(BLIND + name))} "
        f"| {score['n']} | {describe(name)} |"
        for name, score in metrics.items()
        if not name.startswith(BLIND)
    ]
    head = "| metric | value [95 % interval] | blind control | rows | what it is |"
    return (
        f"## Evaluation\n\n{loss}Answers to held-out rows; in the blind control the pictures were "
        f"exchanged.\n\n{head}\n|---|---|---|---|---|\n" + "\n".join(rows)
    )


def _show(name: str, score: Mapping[str, Any] | None) -> str:
    if score is None or score["value"] is None:
        return "-"
    form = ".1%" if is_rate(name) else ".4g"
    value, *interval = (
        "-" if score[key] is None else format(score[key], form) for key in ("value", "low", "high")
    )
    return f"{value} [{interval[0]}, {interval[1]}]"


def _data(cfg: RunConfig, folder: RunFolder, manifest: Mapping[str, Any]) -> str:
    data = _read(folder.path / DATA)
    parts = ", ".join(
        f"`{Path(part.path).name}` (weight {part.weight:g})" for part in cfg.data.parts
    )
    counts = ("samples", "tokens", "label_tokens", "image_tokens", "views")
    rows = [f"| {name.replace('_', ' ')} | {data[name]:,} |" for name in counts if name in data]
    fingerprint = manifest["fingerprints"]["data"]
    return (
        f"## Data\n\nDatasets: {parts}.\nFingerprint: `{fingerprint}`.\n\n"
        "| training split | |\n|---|---|\n" + "\n".join(rows)
    )


def _making(folder: RunFolder, manifest: Mapping[str, Any]) -> str:
    environment = _read(folder.path / ENVIRONMENT)
    lines = [
        f"- ranks: {manifest['world_size']}, ZeRO stage {manifest['zero_stage']}, on "
        f"{environment.get('device', 'an unknown device')}",
        *_versions(manifest),
        f"- commit of phi3v: {environment.get('commit') or 'unknown'}",
        f"- saved: {manifest['saved_at']}",
    ]
    return "## Training\n\n" + "\n".join(lines)


def _versions(manifest: Mapping[str, Any]) -> Iterator[str]:
    named = {name: version for name, version in manifest["versions"].items() if version}
    yield "- versions: " + ", ".join(f"{name} {version}" for name, version in named.items())


def shareable(cfg: RunConfig) -> dict[str, Any]:
    """The resolved recipe with folders by their names."""
    tree = to_dict(cfg)
    for key in PLACES:
        *sections, name = key.split(".")
        values = tree
        for section in sections:
            values = values[section]
        if values.get(name) and (name != "path" or Path(values[name]).is_dir()):
            values[name] = Path(values[name]).name
    shareable_tree: dict[str, Any] = _without_paths(tree)
    shards = [{"path": Path(p.path).name, "weight": p.weight} for p in cfg.data.parts]
    shareable_tree["data"]["shards"] = shards
    return shareable_tree


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
