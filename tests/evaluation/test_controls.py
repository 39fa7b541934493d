"""The controls: nobody is shown an own picture, and the most frequent answer is scored too."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3v.config.running import EvalSection
from phi3v.data import Dataset
from phi3v.data.codecs import Codec
from phi3v.errors import ConfigError
from phi3v.evaluation.controls import constant_answers, digest, exchange
from phi3v.evaluation.evaluate import Evaluation, evaluate
from phi3v.evaluation.generation import Generator
from phi3v.evaluation.metrics import compile_pattern, find_metrics
from phi3v.evaluation.models import open_model
from phi3v.sample import Canvas, Sample
from tests.evaluation.knowing import knowing
from tests.tiny import write_samples

PATTERN = "Product: {title}, Category: {category}, Full Price: {price:float}"


@pytest.fixture(scope="module")
def generator(tiny_model: Path) -> Generator:
    return open_model(tiny_model, 8, 3)


@pytest.fixture(scope="module")
def samples(tiny_shards: Path) -> list[Sample]:
    return list(Dataset(tiny_shards, "train"))


def asked_again(sample: Sample, number: int, answer: str) -> Sample:
    """Another question about the same picture: its first token is another."""
    ids = sample.input_ids.copy()
    ids[sample.meta["prompt_length"] - 1] = 100 + number
    meta = sample.meta | {"reference": answer}
    return replace(sample, id=f"{sample.id}-{number}", input_ids=ids, meta=meta)


def seeing(generator: Generator, rows: list[Sample], folder: Path) -> Evaluation:
    """Of a model that knows each row's answer, but only if it is shown the row's own pictures."""
    write_samples(folder, rows, "validation")
    settings = EvalSection(metrics=("exact_match",))
    return evaluate(knowing(generator, rows), [str(folder)], settings)


# --- the blind control ---


def test_a_model_that_needs_its_picture_is_right_seeing_and_wrong_blind(
    generator: Generator, samples: list[Sample], tmp_path: Path
) -> None:
    found = seeing(generator, samples[:6], tmp_path).scores
    assert (found["exact_match"].value, found["exact_match"].n) == (1.0, 6)
    assert (found["blind_exact_match"].value, found["blind_exact_match"].n) == (0.0, 6)


def test_a_picture_that_is_asked_about_twice_is_nowhere_shown_blind(
    generator: Generator, samples: list[Sample], tmp_path: Path
) -> None:
    """Two files of questions over the same pictures: half way round is the own picture."""
    pictures = samples[:4]
    rows = [asked_again(s, k, f"{k} {n}") for k in (0, 1) for n, s in enumerate(pictures)]
    found = seeing(generator, rows, tmp_path)
    assert found.scores["exact_match"].value == 1.0
    blind = found.scores["blind_exact_match"]
    assert (blind.value, blind.n) == (0.0, 8)
    for outcome in found.outcomes:
        assert outcome.donor is not None
        assert (outcome.donor - outcome.row) % 4, "which is the same picture"


def test_rows_that_cannot_be_asked_blind_are_left_out_and_counted(
    generator: Generator,
    samples: list[Sample],
    mixed_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, *_ = samples
    text = next(s for s in Dataset(mixed_shards, "train") if not s.images)
    rows = [asked_again(one, 0, "a"), asked_again(one, 1, "b"), text]
    found = seeing(generator, rows, tmp_path / "none")
    assert "blind_exact_match" not in found.scores and found.scores["exact_match"].n == 3
    assert (
        "blind control: 3 of 3 rows are left out (1 without a picture, 2 with no other picture to "
        "get)\n"
    ) in capsys.readouterr().err
    rows = [asked_again(s, 0, "Yes") for s in samples[:2]] + [text]
    found = seeing(generator, rows, tmp_path / "some")
    assert (found.scores["blind_exact_match"].n, found.scores["exact_match"].n) == (2, 3)
    assert (
        "blind control: 1 of 3 rows are left out (1 without a picture); 2 of 2 rows get pictures "
        "of a row with the same answer\n"
    ) in capsys.readouterr().err


PICTURES = st.lists(st.lists(st.sampled_from("abcdef"), max_size=3), max_size=24)


@given(PICTURES, st.randoms())
def test_no_row_gets_a_picture_of_its_own_and_none_is_left_out_needlessly(
    pictures: list[list[str]], random: Random
) -> None:
    answers = [random.choice(["yes", "no", "red"]) for _ in pictures]
    partners = exchange(pictures, answers)
    for row, partner in enumerate(partners):
        own = set(pictures[row])
        possible = [
            other
            for other, shown in enumerate(pictures)
            if own and len(shown) == len(pictures[row]) and not own & set(shown)
        ]
        assert partner in possible if possible else partner is None
    assert partners == exchange(pictures, answers), "the same each time and on each rank"


@given(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=24))
def test_each_picture_is_shown_as_often_as_before_if_no_half_of_the_rows_shows_it(
    pictures: list[str],
) -> None:
    partners = exchange([[picture] for picture in pictures], ["x"] * len(pictures))
    if 2 * max(Counter(pictures).values()) <= len(pictures):
        assert sorted(partners) == list(range(len(pictures)))


def test_donors_have_another_answer_where_the_data_allow() -> None:
    """Half way round all would have the same; of three in four that say yes half of them must."""
    answers = ["yes", "no"] * 20
    partners = exchange([[n] for n in range(40)], answers)
    assert all(answers[row] != answers[partner] for row, partner in enumerate(partners))
    answers = ["yes", "yes", "yes", "No."] * 10
    partners = exchange([[n] for n in range(40)], answers)
    same = sum(answers[row] == answers[partner] for row, partner in enumerate(partners))
    assert same == 20 and sorted(partners) == list(range(40))


def test_pictures_are_known_by_their_pixels_and_their_shape() -> None:
    pixels = np.arange(2 * 4 * 3, dtype=np.uint8)
    one = Canvas(pixels.reshape(2, 4, 3))
    assert digest(one) == digest(Canvas(pixels.copy().reshape(2, 4, 3)))
    assert digest(one) != digest(Canvas(pixels.reshape(4, 2, 3)))
    other = pixels.copy()
    other[-1] ^= 1
    assert digest(one) != digest(Canvas(other.reshape(2, 4, 3)))


# --- the constant answer ---


def test_the_constant_answer_is_the_most_frequent_one_of_training(
    generator: Generator, samples: list[Sample], tmp_path: Path
) -> None:
    texts = ["no", "yes ", "red", "yes", "no", "yes"]
    write_samples(tmp_path / "a", [asked_again(samples[0], 0, text) for text in texts])
    write_samples(tmp_path / "b", [asked_again(samples[0], 0, "no") for _ in range(2)])
    settings = EvalSection(metrics=("exact_match", "anls"))
    for folders, answer in ((["a"], "yes "), (["a", "b"], "no")):
        found = constant_answers([str(tmp_path / f) for f in folders], settings, ("anls",))
        assert found == {"anls": answer}
    held_out = [asked_again(s, 0, t) for s, t in zip(samples, ["Yes", "yes", "no"], strict=False)]
    write_samples(tmp_path / "c", held_out, "validation")
    folders = [str(tmp_path / name) for name in "ac"]
    found = evaluate(generator, folders, replace(settings, max_new_tokens=1)).scores
    assert (found["constant_exact_match"].value, found["constant_exact_match"].n) == (1 / 3, 3)
    assert found["constant_anls"].value == 2 / 3


def test_a_field_has_the_constant_answer_of_its_most_frequent_value(
    generator: Generator, tiny_shards: Path
) -> None:
    """Whole answers are all different, categories are not."""
    names = ("category_accuracy", "exact_match")
    settings = EvalSection(metrics=names, pattern=PATTERN, max_new_tokens=1, blind=False)
    found = evaluate(generator, [str(tiny_shards)], settings)

    def category(sample: Sample) -> str:
        match = re.search(r"Category: (.*), Full", sample.meta["reference"])
        assert match is not None
        return match[1]

    trained = [category(s) for s in Dataset(tiny_shards, "train")]
    most = max(dict.fromkeys(trained), key=trained.count)
    held_out = [category(s) for s in Dataset(tiny_shards, "validation")]
    value = found.scores["constant_category_accuracy"].value
    assert value == pytest.approx(held_out.count(most) / len(held_out))


def test_without_training_answers_there_is_no_constant_one_and_that_is_said(
    generator: Generator, samples: list[Sample], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = seeing(generator, samples[:2], tmp_path)
    assert not any(name.startswith("constant_") for name in found.scores)
    assert capsys.readouterr().err.endswith(
        f"{tmp_path} has no training answers, so there is no score of the most frequent one beside "
        "the model's\n"
    )


def test_a_metas_text_is_read_without_its_pictures(samples: list[Sample], tmp_path: Path) -> None:
    data = Dataset(write_samples(tmp_path, samples[:3], codec=Codec("png")), "train")
    assert [data.read_meta(row) for row in range(3)] == [s.meta for s in samples[:3]]
    with pytest.raises(IndexError):
        data.read_meta(3)


def test_a_field_named_as_a_control_is_refused_beside_what_it_would_control() -> None:
    for prefix in ("blind", "constant"):
        fields = compile_pattern(f"{{{prefix}}}")
        assert find_metrics([f"{prefix}_accuracy"], fields)
        with pytest.raises(ConfigError) as caught:
            find_metrics(["accuracy", f"{prefix}_accuracy"], fields)
        assert str(caught.value) == (
            f"eval.metrics has '{prefix}_accuracy', which is also the name of a control of another "
            "of eval.metrics; name the field otherwise in eval.pattern, or leave one out"
        )
