"""Metrics of whole texts, worked by hand, and against what their published scripts say."""

import pytest

from phi3v.errors import ConfigError
from phi3v.evaluation.metrics import Answer, compile_pattern, score
from phi3v.evaluation.metrics.text import (
    accuracy,
    anls,
    exact_match,
    last_price,
    read_number,
    relaxed_accuracy,
    rouge_l,
    similarity,
)
from phi3v.evaluation.metrics.vqa import normalise as normalise_vqa

Case = tuple[str, str, float]


def value(name: str, *answers: Answer) -> float | None:
    return score([name], answers, None)[name].value


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        (" a cap\n", "a cap", 1.0),
        ("a  cap", "a cap", 0.0),
        ("A cap", "a cap", 0.0),
        ("a cap.", "a cap", 0.0),
    ],
)
def test_exact_match_ignores_white_space_around_a_text_only(prediction, reference, expected):
    assert exact_match(prediction, reference) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        (" A  Cap .\n", "a cap", 1.0),
        ("STRASSE", "stra\u00dfe", 1.0),
        ("a cap..", "a cap", 0.0),  # one period
        ("a cap!", "a cap", 0.0),
        ("the cap", "cap", 0.0),  # articles count
        ("", ".", 1.0),
    ],
)
def test_accuracy_ignores_case_white_space_and_one_final_period(prediction, reference, expected):
    assert accuracy(prediction, reference) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Hello World", "hello  world ", 1.0),
        ("hello wrld", "hello world", 1 - 1 / 11),  # one letter of the longer text's 11
        ("abcd", "abxy", 0.0),  # d = 2 / 4: not below the threshold
        ("abcde", "abcxy", 1 - 2 / 5),
        ("abc", "abcdefgh", 0.0),  # d = 5 / 8
        ("", "", 1.0),
        ("", "a", 0.0),
    ],
)
def test_anls_is_one_minus_the_edit_distance_and_nothing_from_a_half_on(
    prediction, reference, expected
):
    assert anls(prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [("kitten", "sitting", 1 - 3 / 7), ("A", "a", 0.0), ("", "", 1.0), ("", "ab", 0.0)],
)
def test_similarity_counts_case_and_has_no_threshold(prediction, reference, expected):
    assert similarity(prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # What Pix2Struct's `relaxed_correctness` gives, and so lmms-eval's and VLMEvalKit's. It is
        # the same for 300,000 random pairs of numbers and percentages.
        ("105", "100", 1.0),
        ("105.1", "100", 0.0),
        ("95", "100", 1.0),
        ("94.9", "100", 0.0),
        ("10.5", "10", 1.0),
        ("2.1", "2", 0.0),  # the edge in floats: 0.05000000000000004
        ("1.9", "2", 0.0),
        ("-100", "100", 0.0),
        ("-105", "-100", 1.0),
        ("1,250", "1250", 0.0),  # commas make a text
        ("1,250", "1,250", 1.0),
        ("1,251", "1,250", 0.0),
        ("12.5%", "0.125", 1.0),  # a percentage is a fraction ...
        ("12.5%", "12.5", 0.0),  # ... and not its number
        ("13 %", "12.5%", 1.0),
        ("0", "0", 1.0),
        ("0.0", "0", 0.0),  # what should be 0 is compared as text
        ("0%", "0", 0.0),
        ("0.001", "0", 0.0),
        ("0", "5", 0.0),
        ("2019", "2010", 1.0),  # a year is a number
        ("1900", "2010", 0.0),
        ("12 May 2010", "12 May 2011", 0.0),  # a date is a text
        ("1e3", "1000", 1.0),
        ("$5", "5", 0.0),
        ("Yes", "yes ", 1.0),
        ("yes.", "yes", 0.0),
        ("5 cats", "5", 0.0),
        ("", "5", 0.0),
    ],
)
def test_relaxed_accuracy_is_that_of_the_published_figures(prediction, reference, expected):
    assert relaxed_accuracy(prediction, reference) == expected


@pytest.mark.parametrize("text", ["1,25", "nan", "inf", "", ".", "-", "%", "1.2.3", "9" * 400])
def test_what_is_no_number_is_compared_as_text(text):
    assert read_number(text) is None
    assert relaxed_accuracy(text, text) == 1.0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # Worked by hand: 2 * longest common subsequence / (words + words). rouge-score 0.1.2 says
        # the same of these and, to 2e-16, of 3,000 random pairs.
        ("The quick brown dog.", "the quick fox jumped", 4 / 8),
        ("It's 1,250.50 EUR", "its 1250.50 eur", 4 / 10),  # it s 1 250 50 eur; its 1250 50 eur
        ("a b c d", "d c b a", 2 / 8),
        ("Caf\u00e9 au lait", "cafe au lait", 4 / 6),  # caf au lait
        ("\u65e5\u672c", "\u65e5\u672c", 0.0),
        ("", "", 0.0),
    ],
)
def test_rouge_l_is_the_f1_of_the_words_in_order(prediction, reference, expected):
    assert rouge_l(prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "prediction", "references", "expected"),
    [
        ("exact_match", "two", ("2", "two"), 1.0),
        ("accuracy", "TWO.", ("2", "two"), 1.0),
        ("anls", "tow cats", ("a pair", "two cats"), 1 - 2 / 8),
        ("relaxed_accuracy", "21", ("two", "20"), 1.0),
        ("rouge_l", "two cats", ("a pair", "two big cats"), 4 / 5),
    ],
)
def test_the_best_of_the_accepted_answers_counts(name, prediction, references, expected):
    assert value(name, Answer("r", "a pair", prediction, references)) == pytest.approx(expected)


def test_the_reference_alone_is_accepted_where_no_others_are_named():
    assert value("exact_match", Answer("r", "two", "two")) == 1.0
    assert value("exact_match", Answer("r", "two", "two", ("2",))) == 0.0  # these are all there are


# --- the walkthrough's price error ---


@pytest.mark.parametrize(
    ("text", "price"),
    [
        ("Full Price: 1,250.00", 1250.0),
        ("Price: 120 <|end|>", 0.0),
        ("Price: 120.", 120.0),
        ("a price", 0.0),
        ("", 0.0),
        ("nan", 0.0),
        ("inf", 0.0),
        ("9" * 300, 0.0),
    ],
)
def test_the_walkthrough_reads_the_last_word_as_the_price(text, price):
    assert last_price(text) == price


def test_the_walkthroughs_price_error_is_of_the_teacher_forced_text():
    seen = Answer("1", "Price: 1,000", "Price: 1,000", (), "Price: 900")
    lost = Answer("2", "Price: 100", "Price: 100", (), "Price: 100 \n<|end|>")
    other = Answer("3", "Price: 100", "Price: 100")
    name = "teacher_forced_price_error"
    found = score([name], [seen, lost, other], None)[name]
    assert (found.value, found.n) == ((100 + 100) / 2, 2)  # the third was not asked for
    assert score([name], [other], None)[name].n == 0


PEOPLE = ("red",) * 4 + ("dark red",) * 3 + ("2",) * 2 + ("don't know",)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("red", PEOPLE, 1.0),
        ("dark red", PEOPLE, (3 * 2 / 3 + 7) / 10),
        ("2", PEOPLE, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("dont know", PEOPLE, (0 + 9 / 3) / 10),
        ("blue", PEOPLE, 0.0),
        ("The RED.", PEOPLE, 1.0),
        ("Two", PEOPLE, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("dark-red", PEOPLE, (3 * 2 / 3 + 7) / 10),
        ("1,000", ("1000",) * 10, 1.0),
        ("1.5", ("1.5",) * 10, 1.0),
        ("1.5", ("15",) * 10, 0.0),
        ("1,000,000", ("1000000",) * 10, 1.0),
        ("5 a.m.", ("5 am",) * 10, 1.0),
        ("none", ("0",) * 10, 1.0),
        ("what?", ("what",) * 5 + ("who",) * 5, 1.0),
        ("red", ("red", "blue"), 1.0),
        ("green", ("red", "blue"), 0.0),
    ],
)
def test_vqa_accuracy_asks_whether_three_of_the_others_said_it(prediction, answers, expected):
    found = value("vqa_accuracy", Answer("a", "red", prediction, answers))
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("others", range(5))
def test_vqa_accuracy_is_the_mean_over_the_ten_ways_to_leave_one_person_out(others):
    """The official evaluation: 0, 0.3, 0.6, 0.9 and 1 for what 0, 1, 2, 3 and 4 of ten said."""
    people = ("red",) * others + tuple(f"colour {number}" for number in range(10 - others))
    nines = [people[:left] + people[left + 1 :] for left in range(10)]
    official = sum(min(1, nine.count("red") / 3) for nine in nines) / 10
    assert official == pytest.approx((0, 0.3, 0.6, 0.9, 1.0)[others])
    assert value("vqa_accuracy", Answer("a", "x", "red", people)) == pytest.approx(official)


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("dont", "don't"),
        ("hadnt've", "hadn't've"),
        ("hadn'tve", "hadn't've"),
        ("yall'd've", "y'all'd've"),
        ("twas", "'twas"),
        ("somebody'd", "somebodyd"),  # as the challenge has it
        ("Im", "im"),  # the challenge has it in upper case, which no lower-cased word is
        ("its", "its"),
        ("lets", "lets"),
        ("well", "well"),
        ("Id", "id"),
    ],
)
def test_the_apostrophes_that_are_put_back_are_the_challenges(text, normalised):
    assert normalise_vqa(text) == normalised


def test_a_reference_with_a_decimal_comma_is_told_so() -> None:
    pattern = compile_pattern("{price:float} EUR")
    with pytest.raises(ConfigError, match=r"1,5 has a decimal comma, :float reads a point; "):
        score(["price_mae"], [Answer("a", "1,5 EUR", "1.5 EUR")], pattern)
