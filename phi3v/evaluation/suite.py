"""Several datasets that models are asked about at once, each by metrics of its own.

    datasets:                                   # suite.yaml
      - shards: shards/docvqa
        eval: {rows: 500, metrics: [anls]}
      - {name: charts, shards: shards/chartqa, eval: {metrics: [relaxed_accuracy]}}

A model is loaded once. A single dataset is a suite of one, without a name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phi3v.config import SuiteConfig, load_recipe
from phi3v.config.running import EvalSection
from phi3v.data import Dataset
from phi3v.errors import ConfigError, Phi3VError
from phi3v.evaluation.comparison import Comparison, compare_models, comparison_values
from phi3v.evaluation.evaluate import Evaluation, evaluate
from phi3v.evaluation.generation import Generator
from phi3v.evaluation.held_out import open_held_out
from phi3v.files import write_json


@dataclass(frozen=True)
class Part:
    """A dataset of a suite, and what is asked of it.

    name   "" of one that stands alone
    owner  the suite file, or who set the time limit, for a line about rows left out
    """

    name: str
    folders: tuple[str, ...]
    settings: EvalSection
    owner: str


@dataclass(frozen=True)
class Found:
    """What all models gave on a dataset, and how far they are apart."""

    part: Part
    evaluations: Mapping[str, Evaluation]
    comparisons: Sequence[Comparison]


def read_suite(path: Path) -> list[Part]:
    """Read a suite file.

    Raises: ConfigError naming the file and the key that is wrong.
    """
    cfg = load_recipe(SuiteConfig, path, [])
    return [Part(one.title, (one.shards,), one.eval, str(path)) for one in cfg.datasets]


def check_suite_alone(given: Sequence[str]) -> None:
    """Refuse settings beside a suite, which says all of them.

    given  --split, eval.KEY=value: what the command line has of it

    Raises: ConfigError
    """
    if given:
        raise ConfigError(
            f"--suite says what each dataset is asked, so {given[0]} does not go with it; write it "
            "into the suite file"
        )


def open_parts(parts: Sequence[Part]) -> list[Dataset]:
    """Open all datasets, to refuse what cannot work before a model is loaded.

    Raises: as `open_held_out`, naming the dataset of the suite.
    """
    found: list[Dataset] = []
    for part in parts:
        try:
            found += open_held_out(part.folders, part.settings).datasets
        except Phi3VError as error:
            if not part.name:
                raise
            raise type(error)(f"{part.owner}, dataset '{part.name}': {error}") from error
    return found


def ask_about(model: str, generator: Generator, parts: Sequence[Part]) -> dict[str, Evaluation]:
    """Evaluate one model on each dataset; returns what it gave by the dataset's name."""
    found = {}
    for part in parts:
        settings = part.settings
        asked = replace(
            generator, max_new_tokens=settings.max_new_tokens, batch_rows=settings.batch_rows
        )
        where = f" on {part.name}" if part.name else ""
        name = f"{model}{where} (time limit of {part.owner})"
        found[part.name] = evaluate(asked, part.folders, settings, name=name)
    return found


def compare_all(
    parts: Sequence[Part], given: Mapping[str, Mapping[str, Evaluation]]
) -> list[Found]:
    """Compare the models on each dataset; `given` has by model what `ask_about` returned."""
    found = []
    for part in parts:
        evaluations = {model: by_part[part.name] for model, by_part in given.items()}
        comparisons = compare_models(evaluations, part.folders, part.settings)
        found.append(Found(part, evaluations, comparisons))
    return found


def write_found(path: Path, found: Sequence[Found]) -> None:
    """Write everything that was found as JSON; of a suite by dataset what one alone would have."""
    by_name = {
        one.part.name: comparison_values(
            one.evaluations, one.comparisons, one.part.folders, one.part.settings
        )
        for one in found
    }
    alone = by_name.get("")
    write_json(path, alone or {"suite": found[0].part.owner, "datasets": by_name})
