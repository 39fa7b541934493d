"""What launch/evaluate.py does: models by name, asked about a dataset or a suite of them."""

from collections.abc import Sequence
from pathlib import Path

from phi3v.evaluation.comparison import check_request
from phi3v.evaluation.evaluate import limit_owner
from phi3v.evaluation.suite import (
    Found,
    Part,
    ask_about,
    check_suite_alone,
    compare_all,
    open_parts,
    read_suite,
    write_found,
)
from phi3v.export.opening import base_of, check_shards, check_step, evaluation_settings, open_any


def ask_models(
    models: Sequence[str],
    asked: str | Path,
    overrides: Sequence[str],
    step: str | None = None,
    out: Path | None = None,
) -> list[Found]:
    """Ask each model, and write what was found to `out`.

    asked  a dataset folder, or the Path of a suite file

    Raises: ConfigError, ShardError or CheckpointError before a model is loaded if anything does
    not fit together.
    """
    check_request(models, out)
    parts = _parts(models, asked, overrides)
    for dataset in open_parts(parts):
        for model in models:
            check_shards(model, dataset)
    steps = check_step(models, step)
    given = {
        model: ask_about(model, open_any(model, parts[0].settings, steps[model]), parts)
        for model in models
    }
    found = compare_all(parts, given)
    if out:
        write_found(out, found)
    return found


def _parts(models: Sequence[str], asked: str | Path, overrides: Sequence[str]) -> list[Part]:
    if isinstance(asked, Path):
        check_suite_alone(overrides)
        return read_suite(asked)
    runs = [model for model in models if base_of(model) != model]
    settings = evaluation_settings(Path([*runs, *models][0]), overrides)
    return [Part("", (asked,), settings, limit_owner(runs, overrides))]
