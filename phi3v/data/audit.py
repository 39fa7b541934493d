"""The label audit: what is trained, and which masks look wrong, over any number of samples.

    audit = Audit(assistant_id, end_id)
    audit.add(sample.id, sample.input_ids, sample.labels, sample.meta["trained_answers"])
    manifest["splits"]["train"]["audit"] = merge([audit.to_dict(), another_shards_audit])

An audit is plain JSON of a few kB, whatever the number of samples, and merging does not depend on
how the samples were cut into parts nor on the order of these: counts add up, and lists hold the
first few by a total order.

What a row asks to train is compared with what is trained: where they differ, labels are wrong and
that is an error. A sample of before, which does not record what its row asks, is only suspected.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from phi3v.data.reader import Dataset
from phi3v.errors import ShardError
from phi3v.progress import progress
from phi3v.sample import IGNORED

EXTREMES = 10  # longest and shortest samples that are named
EXAMPLES = 5  # samples named for each kind of suspicion
HIGH_SHARE = 0.95  # of trained tokens
SUB_BINS = 8  # of one doubling

SUSPICIONS = {
    "nothing_trained": "no token is trained",
    "nearly_all_trained": "more than 95 % of the tokens are trained",
    "image_trained": "a position of an image is trained, or a label is negative",
    "changed_label": "a label differs from its token",
    "not_after_assistant": "a trained run does not follow <|assistant|>",
    "not_ended": "a trained run does not end with <|end|>",
    "beyond_end": "a trained run goes on behind <|end|>",
    "empty_answer": "an answer is nothing but <|end|>",
    "untrained_answer": "an answer is not trained, another is; what the row asks is not recorded",
}
"""Kinds of masks that deserve a look, and what each means."""

_Entry = tuple[int, str, int]  # tokens, id, trained tokens
_Run = tuple[int, int]  # the first and the last of its positions

ANSWERS = ("trained", "excluded", "unrecorded_samples")
"""What is counted of answers; `weight: 0` and the like exclude one."""

PICTURES = ("pictures", "transparent", "turned", "deep")
"""What is counted of pictures: all, and those with each of the traits of `processing.pixels`."""


class Audit:
    """Gathers the audit of samples; a sample of 3,000 tokens takes 40 us.

    assistant_id, end_id  tokens of <|assistant|> and <|end|>
    """

    def __init__(self, assistant_id: int, end_id: int) -> None:
        self.assistant_id, self.end_id = assistant_id, end_id
        self._totals = Counter(samples=0, tokens=0, image_tokens=0, label_tokens=0)
        self._answers = Counter(dict.fromkeys(ANSWERS, 0))
        self._pictures = Counter(dict.fromkeys(PICTURES, 0))
        self._bins: dict[str, Counter[int]] = {"tokens": Counter(), "label_tokens": Counter()}
        self._suspicious: dict[str, tuple[int, list[str]]] = {}
        self._longest: list[_Entry] = []
        self._shortest: list[_Entry] = []

    def add(
        self,
        name: str,
        input_ids: np.ndarray,
        labels: np.ndarray,
        asked: Sequence[bool] | None,
        times: int = 1,
    ) -> None:
        """Count a sample, `times` times where its source's weight lists it so often.

        input_ids, labels  (T,); -100 where nothing is trained, negative ids for images
        asked              of each answer whether its row asks to train it; None if not recorded
        Raises: ShardError naming the sample if anything is trained but each of these answers, whole
        and with its end.
        """
        places = np.flatnonzero(labels != IGNORED)
        answers, kinds = self._answers_in(input_ids), self._suspicions(input_ids, labels, places)
        if asked is None:
            self._answers["unrecorded_samples"] += times
            said = [labels[first : last + 1] for first, last in answers if first < len(labels)]
            if len(places) and any((part == IGNORED).all() for part in said):
                kinds.append("untrained_answer")
        else:
            _check(name, input_ids, labels, answers, list(asked))
            self._answers["trained"] += times * sum(asked)
            self._answers["excluded"] += times * (len(asked) - sum(asked))
        tokens, trained = len(input_ids), len(places)
        counts = {"samples": 1, "tokens": tokens, "label_tokens": trained}
        counts["image_tokens"] = int(np.count_nonzero(input_ids < 0))
        for key, count in counts.items():
            self._totals[key] += times * count
        for key, bins in self._bins.items():
            bins[bin_start(counts[key])] += times
        _keep(self._longest, (-tokens, name, trained), EXTREMES)
        _keep(self._shortest, (tokens, name, trained), EXTREMES)
        for kind in kinds:
            count, examples = self._suspicious.setdefault(kind, (0, []))
            self._suspicious[kind] = (count + times, examples)
            _keep(examples, name, EXAMPLES)

    def add_pictures(self, count: int, traits: Mapping[str, int], times: int = 1) -> None:
        """Count a sample's pictures, `times` times, and how many of them have which trait."""
        for name, number in {"pictures": count, **traits}.items():
            self._pictures[name] += times * number

    def to_dict(self) -> dict[str, Any]:
        """What was found, as `merge` gives it."""
        return {
            **self._totals,
            "label_share": _share(self._totals),
            "answers": dict(self._answers),
            "pictures": dict(self._pictures),
            "histograms": {key: _listed(bins) for key, bins in self._bins.items()},
            "longest": [_named((-size, name, count)) for size, name, count in self._longest],
            "shortest": [_named(entry) for entry in self._shortest],
            "suspicious": {
                kind: {"count": count, "examples": list(examples)}
                for kind, (count, examples) in sorted(self._suspicious.items())
            },
        }

    def _answers_in(self, input_ids: np.ndarray) -> list[_Run]:
        """Where answers lie: from after <|assistant|> to <|end|>, or one past the last token."""
        opened = np.flatnonzero(input_ids == self.assistant_id)
        ends = np.append(np.flatnonzero(input_ids == self.end_id), len(input_ids))
        stops = ends[np.searchsorted(ends, opened)]
        return list(zip((opened + 1).tolist(), stops.tolist(), strict=True))

    def _suspicions(
        self, input_ids: np.ndarray, labels: np.ndarray, places: np.ndarray
    ) -> list[str]:
        """The kinds that one sample belongs to, by its mask alone."""
        if not len(places):
            return ["nothing_trained"]
        runs = _runs(places)
        tokens, targets = input_ids[places], labels[places]
        num_ended = sum(bool(input_ids[last] == self.end_id) for _, last in runs)
        is_changed = bool((tokens != targets).any())
        found = {
            "nearly_all_trained": len(places) > HIGH_SHARE * len(input_ids),
            "image_trained": tokens.min() < 0 or (is_changed and targets.min() < 0),
            "changed_label": is_changed,
            "not_after_assistant": any(
                first == 0 or input_ids[first - 1] != self.assistant_id for first, _ in runs
            ),
            "not_ended": num_ended < len(runs),
            "beyond_end": np.count_nonzero(tokens == self.end_id) > num_ended,
            "empty_answer": any(
                first == last and input_ids[first] == self.end_id for first, last in runs
            ),
        }
        return [kind for kind, holds in found.items() if holds]


def _runs(places: np.ndarray) -> list[_Run]:
    """The stretches of trained positions."""
    if not len(places):
        return []
    breaks = np.flatnonzero(places[1:] - places[:-1] > 1)
    firsts, lasts = places[[0, *(breaks + 1)]], places[[*breaks, -1]]
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))


def _check(
    name: str, input_ids: np.ndarray, labels: np.ndarray, answers: Sequence[_Run], asked: list[bool]
) -> None:
    """Refuse a sample that trains anything but the answers that its row asks to train."""
    if len(answers) != len(asked):
        raise _wrong(name, f"it has {len(answers)} answers in its tokens, {len(asked)} in its row")
    runs = set(_runs(np.flatnonzero(labels != IGNORED)))
    wanted = {answer for answer, is_asked in zip(answers, asked, strict=True) if is_asked}
    if lacking := wanted - runs:
        first, last = min(lacking)
        raise _wrong(
            name, f"its row asks to train an answer, tokens {first} to {last}, which is not"
        )
    if strange := runs - wanted:
        first, last = min(strange)
        raise _wrong(name, f"tokens {first} to {last} are trained, which its row does not ask for")
    changed = np.flatnonzero((labels != IGNORED) & (labels != input_ids))
    if len(changed):
        place = int(changed[0])
        raise _wrong(name, f"token {place} is {input_ids[place]}, its label {labels[place]}")


def _wrong(name: str, what: str) -> ShardError:
    return ShardError(
        f"sample '{name}' has wrong labels: {what}; prepare its rows again, and report this row if "
        "that does not help"
    )


def merge(audits: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Join audits into that of all their samples."""
    total = Audit(0, 0)
    for audit in audits:
        total._totals.update({key: audit[key] for key in total._totals})
        total._answers.update(answers_of(audit))
        total._pictures.update(audit.get("pictures", {}))  # not in a manifest of before
        for key, bins in total._bins.items():
            bins.update(dict(audit["histograms"][key]))
        for entry in audit["longest"]:
            _keep(total._longest, (-entry["tokens"], *_rest(entry)), EXTREMES)
        for entry in audit["shortest"]:
            _keep(total._shortest, (entry["tokens"], *_rest(entry)), EXTREMES)
        for kind, found in audit["suspicious"].items():
            count, examples = total._suspicious.setdefault(kind, (0, []))
            total._suspicious[kind] = (count + found["count"], examples)
            for name in found["examples"]:
                _keep(examples, name, EXAMPLES)
    return total.to_dict()


def answers_of(audit: Mapping[str, Any]) -> dict[str, int]:
    """How many answers are trained, how many their rows exclude, and of how many samples nobody
    knows it: all of an audit of before."""
    unrecorded = dict.fromkeys(ANSWERS, 0) | {"unrecorded_samples": audit["samples"]}
    found: dict[str, int] = audit.get("answers", unrecorded)
    return found


def describe_answers(answers: Mapping[str, int]) -> str:
    """In words: "8 answers trained, 2 excluded by their rows"."""
    said = f"{answers['trained']:,} answers trained, {answers['excluded']:,} excluded by their rows"
    if unrecorded := answers["unrecorded_samples"]:
        lacking = f"of {unrecorded:,} samples it is not recorded which answers their rows exclude"
        return f"{said}; {lacking}" if answers["trained"] else lacking
    return said


def audit_split(dataset: Dataset, assistant_id: int, end_id: int) -> dict[str, Any]:
    """The audit of a split: its manifest's, else made now by reading all samples.

    Raises: ShardError naming a sample whose labels are not those that its row asks for.
    """
    if "audit" in dataset.entry:
        return dict(dataset.entry["audit"])
    audit = Audit(assistant_id, end_id)
    with progress(dataset, f"audit {dataset.split}", "sample", len(dataset)) as samples:
        for sample in samples:
            asked = sample.meta.get("trained_answers")  # not in shards of before
            audit.add(sample.id, sample.input_ids, sample.labels, asked)
    return audit.to_dict()


def canvas_sizes(dataset: Dataset) -> np.ndarray:
    """Height and width in pixels of every canvas of a split, from its index: (images, 2) int32."""
    path = dataset.folder / dataset.entry["index"]["file"]
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
        sizes = stream.read_all()["image_sizes"].combine_chunks()
    return np.from_dlpack(sizes.flatten()).reshape(-1, 2)


def bin_start(value: int) -> int:
    """The least value of a value's bin; 8 bins a doubling, exact below 16.

    757 (binary 1011110101) -> 704 (1011000000), the bin of 704 to 767
    """
    shift = max(0, value.bit_length() - SUB_BINS.bit_length())
    return value >> shift << shift


def bin_end(start: int) -> int:
    """The largest value of the bin that starts with `start`."""
    return start + (1 << max(0, start.bit_length() - SUB_BINS.bit_length())) - 1


def _keep(kept: list[Any], entry: Any, count: int) -> None:
    """Put an entry in its place among the least `count`, each once (a sample may be listed twice).

    Most entries are larger than all: one comparison.
    """
    if (len(kept) == count and entry >= kept[-1]) or entry in kept:
        return
    kept.append(entry)
    kept.sort()
    del kept[count:]


def _share(totals: Mapping[str, int]) -> float:
    return totals["label_tokens"] / totals["tokens"] if totals["tokens"] else 0.0


def _listed(bins: Mapping[int, int]) -> list[list[int]]:
    return [[start, bins[start]] for start in sorted(bins)]


def _named(entry: _Entry) -> dict[str, Any]:
    tokens, name, trained = entry
    return {"id": name, "tokens": tokens, "label_tokens": trained}


def _rest(entry: Mapping[str, Any]) -> tuple[str, int]:
    return entry["id"], entry["label_tokens"]
