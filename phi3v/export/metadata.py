"""The head of a model card, which the hub reads: base, license, datasets, and scores.

Its fields are those of the hub's model cards: `license` is that of the model in the repository, so
here that of the base, as the base's own card names it. There is no field for a license of the data;
`data_license` is a key of ours, which the hub passes over. `base_model` and `datasets` are names on
the hub; folders are in neither. `model-index` has the scores of this very step.

Source: huggingface_hub's `ModelCardData` and `EvalResult`; huggingface/hub-docs modelcard.md.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from phi3v.evaluation.metrics.names import controls
from phi3v.evaluation.report.words import metric_value
from phi3v.export.records import Records

TASK = "image-text-to-text"
INHERITED = ("license", "license_name", "license_link")  # of the base's own card
UNKNOWN = "unknown"  # the hub's word for a license that nobody knows


def front_matter(records: Records, is_text_only: bool = False) -> str:
    """The head in YAML.

    is_text_only  of the language model alone, which has no pipeline of the hub and no scores
    """
    theirs = records.base_card
    hub = dict.fromkeys(name for dataset in records.datasets() for name in dataset.hub)
    licenses = dict.fromkeys(
        entry["license"] for dataset in records.datasets() for entry in dataset.licenses
    )
    results = [] if is_text_only else list(eval_results(records))
    data = ModelCardData(
        base_model=records.hub_base,
        datasets=list(hub) or None,
        library_name=None if is_text_only else "transformers",
        pipeline_tag=None if is_text_only else TASK,
        tags=["phi3_v"],
        model_name=records.title if results else None,
        eval_results=results or None,
        data_license=list(licenses) or None,
        **{"license": UNKNOWN, **{key: theirs[key] for key in INHERITED if key in theirs}},
    )
    return str(data.to_yaml())


def license_of_base(records: Records) -> str | None:
    """What the base's own card names: the license's name where it has one; None without any."""
    theirs = records.base_card
    found = theirs.get("license_name") or theirs.get("license")
    return None if found in (None, UNKNOWN) else str(found)


def eval_results(records: Records) -> Iterator[EvalResult]:
    """The scores of the step, each with its interval and number of rows; none of the controls.

    Rates are shares of 1.
    """
    found = records.evaluation
    if found is None:
        return
    split = found.get("split")
    names = [d.name for d in records.datasets() if split is None or split in d.samples]
    name = ", ".join(names or [dataset.name for dataset in records.datasets()])
    of_others = controls(found["metrics"])
    for metric, score in found["metrics"].items():
        if metric not in of_others and score["value"] is not None:
            yield EvalResult(
                task_type=TASK,
                dataset_type=name,
                dataset_name=name,
                dataset_split=split,
                metric_type=metric,
                metric_value=score["value"],
                metric_name=_with_interval(metric, score),
                metric_args={key: score[key] for key in ("low", "high", "n")},
            )


def _with_interval(metric: str, score: Mapping[str, Any]) -> str:
    low, high = (metric_value(metric, score[key]) for key in ("low", "high"))
    return f"{metric} (95% interval {low} to {high}, n={score['n']})"
