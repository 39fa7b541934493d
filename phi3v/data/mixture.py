"""Several dataset folders as one: their samples numbered through, one folder's after the other's.

    data = open_datasets(["shards/docvqa", "shards/llava"], "train", weights=[2, 0.25])
    data[len(data.datasets[0])]  # the first sample of llava

A weight says how often an epoch holds a sample; nothing is repeated or left out here, `parts` tells
the plan. Samples of two datasets may have the same id: whoever names one to people does it by
`qualified_id`.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi3v.config.schema import Verify
from phi3v.data.format import read_manifest
from phi3v.data.reader import Dataset, advice_for
from phi3v.errors import ConfigError, ShardError
from phi3v.sample import Sample
from phi3v.views import ViewSettings

ALIKE = ("crop_size", "image_side", "image_mean", "image_std", "tokenizer")  # of the manifest
SIZES = ("samples", "tokens", "label_tokens", "image_tokens", "views")  # of a split's entry


class Mixture:
    """The samples of one split of several datasets; used as a `Dataset` is.

    tokens, label_tokens, image_tokens, views, message_bytes, memory_bytes  (samples,)
    parts        of each dataset: its first sample, the one behind its last, its weight
    entry        totals of the parts, each sample counted once
    fingerprint  of the parts' fingerprints and weights, in their order

    Raises: ConfigError if two datasets were prepared for different models.
    """

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float]) -> None:
        _check_alike(datasets)
        self.datasets, self.weights = tuple(datasets), tuple(map(float, weights))
        self._starts = np.cumsum([0, *map(len, datasets)]).tolist()
        self.tokens = np.concatenate([d.tokens for d in datasets])
        self.label_tokens = np.concatenate([d.label_tokens for d in datasets])
        self.image_tokens = np.concatenate([d.image_tokens for d in datasets])
        self.views = np.concatenate([d.views for d in datasets])
        self.message_bytes = np.concatenate([d.message_bytes for d in datasets])
        self.memory_bytes = np.concatenate([d.memory_bytes for d in datasets])
        self.entry = {name: sum(d.entry[name] for d in datasets) for name in SIZES}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        dataset, own = self.place(index)
        return dataset[own]

    def __iter__(self) -> Iterator[Sample]:
        return (sample for dataset in self.datasets for sample in dataset)

    def read_meta(self, index: int) -> dict[str, Any]:
        """As `Dataset.read_meta`."""
        dataset, own = self.place(index)
        return dataset.read_meta(own)

    def read_id(self, index: int) -> str:
        """As `Dataset.read_id`."""
        dataset, own = self.place(index)
        return dataset.read_id(own)

    def read_into(self, index: int, buffer: Any) -> Sample:
        """As `Dataset.read_into`."""
        dataset, own = self.place(index)
        return dataset.read_into(own, buffer)

    @property
    def parts(self) -> tuple[tuple[int, int, float], ...]:
        return tuple(zip(self._starts, self._starts[1:], self.weights, strict=False))

    @property
    def view_settings(self) -> ViewSettings:
        """How the canvases of all of them become views."""
        return self.datasets[0].view_settings

    @property
    def fingerprint(self) -> str:
        pairs = [(d.fingerprint, w) for d, w in zip(self.datasets, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()

    def place(self, index: int) -> tuple[Dataset, int]:
        """Which dataset a sample belongs to, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        part = bisect_right(self._starts, index) - 1
        return self.datasets[part], index - self._starts[part]


def qualified_id(data: Dataset | Mixture, index: int) -> str:
    """What a sample is called wherever people read of it: its id, of several datasets DATASET:ID.

    An id belongs to one sample of a dataset (`prepare` sees to that), and `names` are the datasets'
    own, so that no two samples are called the same.
    """
    dataset, _ = data.place(index)
    name = names(data.datasets)[data.datasets.index(dataset)]
    return f"{name}:{data.read_id(index)}" if name else data.read_id(index)


def names(datasets: Sequence[Dataset]) -> list[str]:
    """What tells several datasets apart: as much of the end of each folder's path as that takes.

    a/docvqa, b/llava -> docvqa, llava; a/train, b/train -> a/train, b/train; "" for a single one
    """
    if len(datasets) == 1:
        return [""]
    folders = [dataset.folder.absolute().parts for dataset in datasets]
    longest = max(map(len, folders))
    for length in range(1, longest + 1):
        ends = ["/".join(parts[-length:]) for parts in folders]
        if len(set(ends)) == len(set(folders)):
            break
    return ends


def open_datasets(
    folders: Sequence[str | Path],
    split: str,
    weights: Sequence[float] | None = None,
    is_optional: bool = False,
    verify: Verify | None = None,
) -> Dataset | Mixture:
    """Open a split of each folder; a single one of weight 1 is a plain `Dataset`.

    weights      of the folders; default: 1 each
    verify       as of a `Dataset`
    is_optional  leaves out the folders without the split, as held-out rows need not be everywhere
    Raises: ShardError if a folder is no dataset or lacks the split (is_optional: if all lack it);
    ConfigError if two were prepared for different models.
    """
    pairs = list(zip(folders, weights or [1.0] * len(folders), strict=True))
    if is_optional and len(pairs) > 1:
        pairs = [pair for pair in pairs if split in read_manifest(Path(pair[0]))["splits"]]
        if not pairs:
            raise ShardError(
                f"none of {', '.join(map(str, folders))} has a split '{split}'; {advice_for(split)}"
            )
    datasets = [Dataset(folder, split, verify) for folder, _ in pairs]
    if len(pairs) == 1 and pairs[0][1] == 1:
        return datasets[0]
    return Mixture(datasets, [weight for _, weight in pairs])


def _check_alike(datasets: Sequence[Dataset]) -> None:
    first = datasets[0]
    for other in datasets[1:]:
        for name in ALIKE:
            one, two = first.manifest.get(name), other.manifest.get(name)
            if one != two:
                raise ConfigError(
                    f"data.shards mixes {first.folder}, whose {name} is {one}, with "
                    f"{other.folder}, whose {name} is {two}; prepare both for the same model"
                )
