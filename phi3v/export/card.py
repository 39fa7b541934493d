"""README.md of an export, a model card: what it is, how it is loaded, what it was made of.

Every sentence is made from the run's own files (records.py); what they do not tell is left out or
said to be unknown. The head is what the hub reads: metadata.py.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from phi3v.errors import CheckpointError
from phi3v.evaluation.metrics import describe
from phi3v.evaluation.metrics.names import BLIND, CONSTANT, CONTROL_TITLES, controls
from phi3v.evaluation.report.words import interval_fault, loss_value, metric_value, rows_of
from phi3v.export.metadata import front_matter, license_of_base
from phi3v.export.records import RECIPE, DatasetRecord, Records, read_records
from phi3v.files import write_text
from phi3v.page import clean
from phi3v.pictures import PictureSettings
from phi3v.stored import read_object
from phi3v.training.run_folder import DATA, DEEPSPEED, ENVIRONMENT, EVALUATIONS, METRICS, SUMMARY

TOLD = (DATA, DEEPSPEED, ENVIRONMENT, SUMMARY, METRICS, EVALUATIONS)  # the records it reads

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
DTYPES = {"bfloat16": "bf16", "float32": "fp32"}  # of config.json, as launch/export.py has them


def write_card(run: Path, manifest: Mapping[str, Any], out: Path) -> None:
    """Write the card of a checkpoint of a run beside the config.json of its export.

    manifest  of the checkpoint
    """
    with _telling(run):
        _write_whole(run, manifest, out)


def _write_whole(run: Path, manifest: Mapping[str, Any], out: Path) -> None:
    records = read_records(run, manifest)
    config = read_object(out / "config.json")
    parts = [
        _head(records, front_matter(records)),
        f"Phi-3-Vision, fine-tuned from {_base(records)}. {_modules(records)}",
        f"## Loading\n\n```python\n{PYTHON}```\n\n{_serving(config)}",
        _evaluation(records),
        _data(records, _pictures(out)),
        _licenses(records),
        _training(records),
        _recipes(records),
        _commands(records, _dtype_option(config)),
    ]
    _write(out, parts)


def write_text_card(run: Path, manifest: Mapping[str, Any], out: Path) -> None:
    """Write the card of the text half: what it is, and what to do with it.

    No scores: they are those of the whole model, which was shown pictures.
    """
    with _telling(run):
        _write_half(run, manifest, out)


def _write_half(run: Path, manifest: Mapping[str, Any], out: Path) -> None:
    records = read_records(run, manifest)
    parts = [
        _head(records, front_matter(records, is_text_only=True)),
        f"The text half of a Phi-3-Vision, fine-tuned from {_base(records)}. {_modules(records)}",
        TEXT_HALF,
        _licenses(records),
        _training(records),
    ]
    _write(out, parts)


@contextmanager
def _telling(run: Path) -> Iterator[None]:
    """Refuse records of a run that do not have the form in which a run writes them.

    Raises: CheckpointError
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"the records of {run} do not say what a model card tells ({type(error).__name__}: "
            f"{error}): {', '.join(TOLD)} or its checkpoint's manifest was changed; bring them "
            "back from a copy"
        ) from error


def _write(out: Path, parts: Sequence[str]) -> None:
    text = "\n\n".join(part for part in parts if part)
    write_text(out / "README.md", clean(text) + "\n")


def _head(records: Records, front: str) -> str:
    return f"---\n{front}\n---\n\n# Phi-3-Vision fine-tuned: {records.title}"


def _base(records: Records) -> str:
    return f"{'' if records.hub_base else 'a folder '}`{records.base}`"


def _modules(records: Records) -> str:
    """Which parts of the model learned, and which stayed as they were."""
    trained, frozen = records.trained, records.frozen
    if not frozen:
        return f"All of its modules were trained: {_listed(trained)}."
    if not trained:
        return f"All of its modules were frozen: {_listed(frozen)}."
    return f"Trained: {_listed(trained)}. Frozen: {_listed(frozen)}."


def _listed(words: Sequence[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


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


def _evaluation(records: Records) -> str:
    found = records.evaluation
    if found is None:
        return f"## Evaluation\n\nStep {records.step} was not evaluated during the run."
    metrics = found["metrics"]
    sentences = " ".join(_how_evaluated(records, found))
    return f"## Evaluation\n\n{sentences}" + (f"\n\n{_scores(metrics)}" if metrics else "")


def _how_evaluated(records: Records, found: Mapping[str, Any]) -> Iterator[str]:
    of_others = controls(found["metrics"])
    names = [d.name for d in records.datasets() if found.get("split") in d.samples]
    rows = f"rows of the split `{found['split']}`" if "split" in found else "held-out rows"
    of = f" of {_listed([f'`{name}`' for name in names])}" if names else ""
    over = f" over {found['loss_rows']:,} rows" if found.get("loss_rows") else ""
    yield f"{rows_of([found]).capitalize()} loss {loss_value(found['loss'], digits=4)}{over}."
    if found["metrics"]:
        yield f"Answers to {rows}{of}."
    if any(name.startswith(BLIND) for name in of_others):
        yield "In the blind control each row is asked about another row's pictures."
    if any(name.startswith(CONSTANT) for name in of_others):
        yield "The constant answer is the most frequent one of training."
    if unanswered := found.get("unanswered"):
        yield f"{unanswered:,} rows were left unanswered for want of time, and are in no score."


def _scores(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the metrics, with the controls that were measured."""
    of_others = controls(metrics)
    shown = {
        prefix: title
        for prefix, title in CONTROL_TITLES.items()
        if any(name.startswith(prefix) for name in of_others)
    }
    heads = ("metric", "value [95 % interval]", *shown.values(), "rows", "what it is")
    rows = [
        (
            name,
            _show(name, score),
            *(_show_control(name, metrics.get(prefix + name)) for prefix in shown),
            str(score["n"]),
            describe(name),
        )
        for name, score in metrics.items()
        if name not in of_others
    ]
    return _table(heads, rows)


def _show(name: str, score: Mapping[str, Any]) -> str:
    if score["value"] is None:
        return "-"
    value, low, high = (
        "-" if score[key] is None else metric_value(name, score[key])
        for key in ("value", "low", "high")
    )
    fault = interval_fault(name, score["low"], score["high"], score["n"])
    return f"{value} [{low}, {high}]" + (f" ({fault})" if fault else "")


def _show_control(name: str, score: Mapping[str, Any] | None) -> str:
    """With its own number of rows: the blind control has fewer where some have no picture."""
    return "-" if score is None else f"{_show(name, score)} n={score['n']}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, in whose cells a bare | would begin the next."""
    lines = [heads, ["---"] * len(heads), *rows]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _pictures(out: Path) -> str:
    """How pictures are shown, which other programs take only part of."""
    path = out / "preprocessor_config.json"
    if not path.is_file():
        return ""
    settings = PictureSettings.from_preprocessor(read_object(path), path.name)
    return f"Pictures: {settings} (preprocessor_config.json; other programs read num_crops alone)."


def _data(records: Records, pictures: str) -> str:
    datasets = _table(
        ("dataset", "weight", "training samples", "other splits", "rejected rows"),
        [_dataset_row(dataset) for dataset in records.datasets()],
    )
    counts = ("samples", "tokens", "label_tokens", "image_tokens", "views")
    totals = [
        (name.replace("_", " "), f"{records.data[name]:,}")
        for name in counts
        if name in records.data
    ]
    lines = [f"Fingerprint: `{records.manifest['fingerprints']['data']}`.", pictures]
    if records.cfg.debug.overfit_one_pack:
        lines.append("Of all this only the first pack was trained on (debug.overfit_one_pack).")
    told = "\n".join(line for line in lines if line)
    return f"## Data\n\n{datasets}\n\n{told}\n\n" + _table(("all training splits", ""), totals)


def _dataset_row(dataset: DatasetRecord) -> tuple[str, ...]:
    train = dataset.samples.get("train")
    others = (f"{split} {n:,}" for split, n in dataset.samples.items() if split != "train")
    return (
        f"`{dataset.name}`",
        f"{dataset.weight:g}",
        "not recorded" if train is None else f"{train:,}",
        ", ".join(others) or "-",
        "not recorded" if dataset.rejected is None else f"{dataset.rejected:,}",
    )


def _licenses(records: Records) -> str:
    """What is known of either license; the head has that of the base alone."""
    base = license_of_base(records)
    of_base = (
        f"The card of the base names the license `{base}`, which stands in the head of this one."
        if base
        else "No license of the base is known here."
    )
    told = [
        f"- `{dataset.name}`: {entry['license']} (`{Path(entry['source']).name}`)"
        for dataset in records.datasets()
        for entry in dataset.licenses
    ]
    silent = [f"`{d.name}`" for d in records.datasets() if not d.licenses]
    of_data = "Licenses of the data, as the recipes name them:\n\n" + "\n".join(told)
    if silent:
        of_data = (of_data + "\n\n" if told else "") + f"No license is named for {_listed(silent)}."
    return f"## License\n\n{of_base} {of_data}"


def _training(records: Records) -> str:
    return "## Training\n\n" + "\n".join(f"- {line}" for line in _training_facts(records))


def _training_facts(records: Records) -> Iterator[str]:
    manifest, cfg, environment = records.manifest, records.cfg, records.environment
    if diverged := records.summary.get("diverged"):
        yield f"the run diverged: {diverged}"
    samples = sum(line["samples"] for line in records.steps)
    yield f"steps: {records.step:,}" + (f", over {samples:,} samples" if samples else "")
    rates = [f"{module} {cfg.optim.peak_lr(module):g}" for module in records.trained]
    yield f"peak learning rates: {', '.join(rates) or 'none'}; {cfg.optim.schedule} schedule"
    if (ds := records.deepspeed) is not None:
        is_bf16 = (ds.get("bf16") or {}).get("enabled", False)
        yield (
            f"batch: {ds['train_batch_size']} packs a step, each of {cfg.data.max_tokens:,} tokens "
            f"and {cfg.data.max_views} views at most"
        )
        yield f"precision: {'bfloat16' if is_bf16 else 'float32'}; {ds['optimizer']['type']}"
    num, when = manifest["world_size"], manifest["saved_at"][:19]  # UTC
    yield f"saved: {when}Z by {num} rank{'s' * (num > 1)}, ZeRO stage {manifest['zero_stage']}"
    named = {name: version for name, version in manifest["versions"].items() if version}
    yield "versions: " + ", ".join(f"{name} {version}" for name, version in named.items())
    yield (
        f"last start of the run: on {environment.get('device', 'an unknown device')}, commit of "
        f"phi3v {environment.get('commit') or 'unknown'}"
    )


def _recipes(records: Records) -> str:
    """The files that made the model, under the names that the commands take them by."""
    ds = records.told_deepspeed()
    parts = [(RECIPE, _yaml(records.recipe()))]
    if ds is not None:
        parts.append((DEEPSPEED, f"```json\n{json.dumps(ds, indent=1)}\n```"))
    parts += [
        (f"{dataset.name}.yaml", _yaml(dataset.recipe))
        for dataset in records.datasets()
        if dataset.recipe is not None
    ]
    shown = "\n\n".join(f"`{name}`:\n\n{text}" for name, text in parts)
    return (
        "## Recipe\n\nWith every default; folders by their names, and without what only says how "
        f"the run was watched and kept.\n\n{shown}"
    )


def _yaml(tree: Mapping[str, Any]) -> str:
    return f"```yaml\n{yaml.safe_dump(dict(tree), sort_keys=False, width=90)}```"


def _commands(records: Records, dtype: str) -> str:
    """What asks for the same work, with the recipes of the card."""
    ranks = records.manifest["world_size"]
    under = f"  # on {ranks} ranks: under deepspeed, torchrun or srun" if ranks > 1 else ""
    json_option = "" if records.deepspeed is None else f" --deepspeed_config {DEEPSPEED}"
    lines = [
        *(
            f"python launch/prepare.py {shlex.quote(f'{dataset.name}.yaml')}"
            for dataset in records.datasets()
            if dataset.recipe is not None
        ),
        f"python launch/train.py {RECIPE}{json_option}{under}",
        f"python launch/export.py {shlex.quote(records.name)} --out DIR --step {records.step}"
        f"{dtype}",
    ]
    return (
        "## Commands\n\nThe same work is asked for by these, with the recipes above under their "
        "names:\n\n```\n" + "\n".join(lines) + "\n```"
    )


def _dtype_option(config: Mapping[str, Any]) -> str:
    name = DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))))
    return f" --dtype {name}" if name else ""
