"""The label audit: what it counts, which masks it suspects, and that cutting changes nothing."""

import json
import random

import numpy as np
import pytest

from phi3v.data import Dataset
from phi3v.data.audit import (
    SUSPICIONS,
    Audit,
    answers_of,
    audit_split,
    bin_end,
    bin_start,
    canvas_sizes,
    describe_answers,
    merge,
)
from phi3v.errors import ShardError
from phi3v.sample import IGNORED, Sample
from tests.tiny import make_sample, write_samples

USER, ASSISTANT, END = 10, 11, 12
CHAT = [1, USER, -1, -1, -1, 20, END, ASSISTANT, 30, 31, END, 13]  # trained: 8, 9, 10


def audit(*samples: tuple[str, list[int], list[int]]) -> dict:
    """The audit of samples, each an id, its tokens and the positions that are trained.

    What their rows ask is not recorded, as in shards of before.
    """
    found = Audit(ASSISTANT, END)
    for name, ids, trained in samples:
        found.add(name, np.array(ids, np.int32), labels(ids, trained), None)
    return found.to_dict()


def compared(ids: list[int], trained: list[int], asked: list[bool]) -> dict:
    """The audit of one sample whose row asks to train some of its answers."""
    found = Audit(ASSISTANT, END)
    found.add("bad", np.array(ids, np.int32), labels(ids, trained), asked)
    return found.to_dict()


def labels(ids: list[int], trained: list[int]) -> np.ndarray:
    values = np.full(len(ids), IGNORED, np.int32)
    values[trained] = np.array(ids)[trained]
    return values


def test_it_counts_samples_tokens_images_and_what_is_trained() -> None:
    found = audit(("a", CHAT, [8, 9, 10]), ("b", CHAT[:2] + CHAT[5:], [5, 6, 7]))
    assert [found[key] for key in ("samples", "tokens", "image_tokens")] == [2, 21, 3]
    assert (found["label_tokens"], found["label_share"]) == (6, 6 / 21)
    assert found["histograms"] == {"tokens": [[9, 1], [12, 1]], "label_tokens": [[3, 2]]}
    assert found["longest"][0] == {"id": "a", "tokens": 12, "label_tokens": 3}
    assert found["shortest"][0] == {"id": "b", "tokens": 9, "label_tokens": 3}
    assert found["suspicious"] == {}


TWO_TURNS = [USER, 20, END, ASSISTANT, 30, END, USER, 21, END, ASSISTANT, 31, END]
BOTH = [4, 5, 10, 11]
WRONG = {
    "nothing_trained": (CHAT, []),
    "nearly_all_trained": ([ASSISTANT, *[30] * 38, END], list(range(1, 40))),
    "image_trained": ([*CHAT[:8], -1, END], [8, 9]),
    "not_after_assistant": (CHAT, [9, 10]),
    "not_ended": (CHAT, [8, 9]),
    "beyond_end": (TWO_TURNS, list(range(4, 12))),
    "empty_answer": ([USER, 20, END, ASSISTANT, END], [4]),
    "untrained_answer": (TWO_TURNS, [4, 5]),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_mask_is_suspected_of_just_what_is_wrong(kind: str) -> None:
    found = audit(("bad", *WRONG[kind]), ("good", CHAT, [8, 9, 10]), ("two", TWO_TURNS, BOTH))
    assert found["suspicious"] == {kind: {"count": 1, "examples": ["bad"]}}
    assert set(SUSPICIONS) == {*WRONG, "changed_label"}


def test_a_run_that_starts_the_sample_follows_nobody() -> None:
    found = audit(("bad", [30, END, USER, ASSISTANT], [0, 1]))  # the last token stands before it
    assert found["suspicious"] == {"not_after_assistant": {"count": 1, "examples": ["bad"]}}


@pytest.mark.parametrize(("label", "kinds"), [(99, 1), (-5, 2)])
def test_a_label_of_another_token_is_suspected_and_a_negative_one_twice(
    label: int, kinds: int
) -> None:
    values = labels(CHAT, [8, 9, 10])
    values[9] = label
    found = Audit(ASSISTANT, END)
    found.add("bad", np.array(CHAT, np.int32), values, None)
    expected = ["changed_label", "image_trained"][:kinds]
    assert sorted(found.to_dict()["suspicious"]) == expected


@pytest.mark.parametrize(
    ("ids", "trained", "asked"),
    [
        (CHAT, [8, 9, 10], [True]),
        (CHAT[:2] + CHAT[5:], [5, 6, 7], [True]),  # of text alone
        (TWO_TURNS, BOTH, [True, True]),
        (TWO_TURNS, [4, 5], [True, False]),
        (TWO_TURNS, [10, 11], [False, True]),
        (TWO_TURNS, [], [False, False]),
    ],
)
def test_answers_that_a_row_excludes_are_counted_apart_and_not_suspected(
    ids: list[int], trained: list[int], asked: list[bool]
) -> None:
    found = compared(ids, trained, asked)
    expected = {"trained": sum(asked), "excluded": len(asked) - sum(asked)}
    assert found["answers"] == expected | {"unrecorded_samples": 0}
    assert set(found["suspicious"]) <= ({"nothing_trained"} if not trained else set())


LACKS = "its row asks to train an answer, tokens {} to {}, which is not"
STRANGE = "tokens {} to {} are trained, which its row does not ask for"


@pytest.mark.parametrize(
    ("trained", "asked", "fault"),
    [
        ([4, 5], [True, True], LACKS.format(10, 11)),  # the other one is not trained
        ([10, 11], [True, True], LACKS.format(4, 5)),
        ([], [False, True], LACKS.format(10, 11)),
        ([5, 10, 11], [True, True], LACKS.format(4, 5)),  # not from its first token
        ([4, 10, 11], [True, True], LACKS.format(4, 5)),  # without its end
        ([3, 4, 5, 10, 11], [True, True], LACKS.format(4, 5)),  # one too many
        ([*range(4, 12)], [True, True], LACKS.format(4, 5)),  # one run for both
        ([4, 5, 7, 10, 11], [True, True], STRANGE.format(7, 7)),
        (BOTH, [True, False], STRANGE.format(10, 11)),
        (BOTH, [False, False], STRANGE.format(4, 5)),
        (BOTH, [True], "it has 2 answers in its tokens, 1 in its row"),
        (BOTH, [True, True, True], "it has 2 answers in its tokens, 3 in its row"),
    ],
)
def test_labels_that_are_not_those_that_a_row_asks_for_are_an_error(
    trained: list[int], asked: list[bool], fault: str
) -> None:
    with pytest.raises(ShardError) as caught:
        compared(TWO_TURNS, trained, asked)
    assert str(caught.value) == (
        f"sample 'bad' has wrong labels: {fault}; prepare its rows again, and report this row if "
        "that does not help"
    )


def test_a_label_of_another_token_is_an_error_too() -> None:
    values = labels(TWO_TURNS, BOTH)
    values[10] = 99
    with pytest.raises(ShardError, match="'bad' has wrong labels: token 10 is 31, its label 99;"):
        Audit(ASSISTANT, END).add("bad", np.array(TWO_TURNS, np.int32), values, [True, True])


def test_an_answer_that_never_ends_cannot_be_trained_as_its_row_asks() -> None:
    with pytest.raises(ShardError, match=LACKS.format(4, 6)):
        compared([*TWO_TURNS[:4], 30, 31], [4, 5], [True])


def test_where_nothing_is_recorded_it_is_said_and_parts_of_both_kinds_add_up() -> None:
    whole, of_before = compared(TWO_TURNS, [4, 5], [True, False]), audit(("old", CHAT, [8, 9, 10]))
    del of_before["answers"]
    assert answers_of(of_before)["unrecorded_samples"] == 1
    found = merge([whole, of_before])["answers"]
    assert found == {"trained": 1, "excluded": 1, "unrecorded_samples": 1}
    assert describe_answers(found) == (
        "1 answers trained, 1 excluded by their rows; "
        "of 1 samples it is not recorded which answers their rows exclude"
    )
    assert describe_answers(answers_of(of_before)).startswith("of 1 samples it is not recorded")
    assert describe_answers(whole["answers"]) == "1 answers trained, 1 excluded by their rows"


def some_samples(count: int) -> list[tuple[str, list[int], list[int]]]:
    pick = random.Random(0)
    chosen = []
    for number in range(count):
        text = [20] * pick.randrange(40)
        ids = [USER, *text, ASSISTANT, 30, END]
        wrong = pick.choice([[], [len(ids) - 2], [len(ids) - 1]])
        chosen.append((f"s{number}", ids, wrong or [len(ids) - 2, len(ids) - 1]))
    return chosen


def test_parts_merge_to_the_same_whatever_their_cut_and_order() -> None:
    samples = some_samples(300)
    whole = audit(*samples)
    for seed in range(5):
        pick = random.Random(seed)
        mixed = pick.sample(samples, len(samples))
        cuts = sorted(pick.sample(range(300), 7))
        parts = [audit(*mixed[a:b]) for a, b in zip([0, *cuts], [*cuts, 300], strict=True)]
        merged = merge(json.loads(json.dumps(part)) for part in parts)
        assert json.dumps(merged) == json.dumps(whole)
    assert merge([]) == audit()


def test_the_extremes_are_ten_each_with_ties_broken_by_id_and_examples_are_five() -> None:
    samples = some_samples(300)
    found = audit(*samples)
    sizes = sorted((len(ids), name) for name, ids, _ in samples)
    assert [(s["tokens"], s["id"]) for s in found["shortest"]] == sizes[:10]
    sizes.sort(key=lambda pair: (-pair[0], pair[1]))
    assert [(s["tokens"], s["id"]) for s in found["longest"]] == sizes[:10]
    late = sorted(name for name, ids, trained in samples if trained == [len(ids) - 1])
    kind = found["suspicious"]["not_after_assistant"]
    assert kind == {"count": len(late), "examples": late[:5]}


def test_a_sample_listed_twice_counts_twice_and_is_named_once() -> None:
    once, twice, each = Audit(ASSISTANT, END), Audit(ASSISTANT, END), ("a", np.array(CHAT))
    once.add(*each, labels(CHAT, []), [False], times=2)
    for _ in range(2):
        twice.add(*each, labels(CHAT, []), [False])
    found = once.to_dict()
    assert found == twice.to_dict()
    assert (found["tokens"], len(found["longest"])) == (24, 1)
    assert found["suspicious"]["nothing_trained"] == {"count": 2, "examples": ["a"]}
    assert found["answers"] == {"trained": 0, "excluded": 2, "unrecorded_samples": 0}


def test_bins_hold_every_number_once_and_are_an_eighth_of_a_doubling() -> None:
    starts = [bin_start(value) for value in range(5000)]
    assert starts == sorted(starts) and starts[:16] == list(range(16))
    for value, start in enumerate(starts):
        assert start <= value <= bin_end(start)
        assert bin_start(bin_end(start)) == start != bin_start(bin_end(start) + 1)
    assert bin_start(757) == 704 and bin_end(704) == 767


def test_a_dataset_without_an_audit_is_read_through_and_one_with_it_is_not(tmp_path) -> None:
    samples = [make_sample("a", text=6, grids=[(1, 2), (2, 1)]), make_sample("b", text=9)]
    dataset = Dataset(write_samples(tmp_path / "shards", samples), "train")
    found = audit_split(dataset, ASSISTANT, END)
    assert [found[key] for key in ("samples", "tokens", "label_tokens")] == [
        2,
        sum(dataset.tokens),
        sum(dataset.label_tokens),
    ]
    assert found["answers"]["unrecorded_samples"] == 2
    dataset.entry["audit"] = audit(("c", CHAT, [8]))
    assert audit_split(dataset, ASSISTANT, END) == dataset.entry["audit"]


def test_a_sample_read_from_shards_is_compared_with_what_its_row_asked(tmp_path) -> None:
    ids = np.array(TWO_TURNS, np.int32)
    for name, trained in (("right", [10, 11]), ("wrong", [4, 5])):
        meta = {"prompt_length": 10, "reference": "x", "trained_answers": [False, True]}
        sample = Sample(name, ids, labels(TWO_TURNS, trained), (), meta)
        dataset = Dataset(write_samples(tmp_path / name, [sample]), "train")
        if name == "right":
            assert audit_split(dataset, ASSISTANT, END)["answers"]["excluded"] == 1
        else:
            with pytest.raises(ShardError, match="sample 'wrong' has wrong labels: "):
                audit_split(dataset, ASSISTANT, END)


def test_canvas_sizes_are_those_of_all_images_in_order(tmp_path) -> None:
    samples = [
        make_sample("a", grids=[(1, 2), (2, 1)]),
        make_sample("b"),
        make_sample("c", 6, [(3, 1)]),
    ]
    dataset = Dataset(write_samples(tmp_path / "shards", samples), "train")
    sizes = [image.size for sample in samples for image in sample.images]
    assert canvas_sizes(dataset).tolist() == [list(size) for size in sizes]
    bare = Dataset(write_samples(tmp_path / "bare", samples[1:2]), "train")
    assert canvas_sizes(bare).shape == (0, 2)
