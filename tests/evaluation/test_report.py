"""The page stands alone, says all it was given, and survives runs that measured little."""

import base64
import io
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from phi3v.evaluation.bars import Bar, bar_chart
from phi3v.evaluation.charts import Curve, left_margin, line_chart, short_number, smooth
from phi3v.evaluation.report import Example, Report, write_report
from phi3v.evaluation.report.page import MOST_BYTES
from phi3v.evaluation.report.words import operations
from tests.evaluation.reports import BARE, DATA, EXAMPLES, FULL, SUMMARY, evaluation, rate, step
from tests.page import Page

SECTIONS = (
    *("metrics", "evaluations", "training", "throughput", "examples", "data"),
    *("checkpoints", "faults", "settings", "totals", "recipe"),
)


@pytest.fixture
def render(tmp_path: Path):
    def run(steps=(), report: Report = BARE, **changes) -> Page:
        path = tmp_path / "report.html"
        write_report(path, replace(report, steps=report.steps or list(steps), **changes))
        return Page(path.read_text(encoding="utf-8"))

    return run


def test_the_page_needs_nothing_from_outside(render):
    page = render(report=FULL)
    links = [a[key] for _, a in page.tags for key in ("src", "href", "srcset") if key in a]
    assert links and all(link.startswith(("data:image/jpeg;base64,", "#")) for link in links)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    assert "url(" not in page.source and "@import" not in page.source
    assert "default-src 'none'" in page.source


def test_everything_from_the_run_is_escaped(render):
    page = render(report=FULL)
    assert "<script" not in page.source and "<b>belt" not in page.source
    texts = ("A <script>x</script>", "A bag & a <b>belt</b>", "models/<tiny>")
    for text in (*texts, "row-<7>", "shards/<one>", "run: {out: <x>}"):
        assert text in page.text
    assert page.text.count("products & more") == 2  # title and heading


def test_every_metric_is_shown_with_interval_n_and_blind_control(render):
    text = render().text
    row = text[text.index("category_accuracy") : text.index("price_mape")]
    for shown in (
        "92.2%",
        "88.7% \u2013 95.3%",
        "n = 256",
        "12.5%",
        "8.6% \u2013 16.8%",
        "n = 250",
        "9.4%",
    ):
        assert shown in row
    assert "8.1%" in text and "n = 255" in text and "lower is better" in text
    assert "no rows" in text and "only values that never occur in training" in text
    assert "blind_category_accuracy" not in text  # a column, not a row
    assert "constant_category_accuracy" not in text
    assert "most frequent answer of the training split" in text.replace("\n", " ")
    assert "has learnt the text and not the picture" in text.replace("\n", " ")


def test_a_control_that_was_not_run_is_not_spoken_of(render):
    shown = {"anls": rate(0.5, 0.4, 0.6), "constant_anls": rate(0.1, 0.0, 0.2)}
    text = render(summary={"metrics": shown}, examples=()).text
    assert "Constant answer: every row is given" in text and "blind" not in text.lower()
    del shown["constant_anls"]
    assert "constant" not in render(summary={"metrics": shown}, examples=()).text.lower()


def test_rows_that_were_trained_on_are_not_called_held_out(render):
    summary = {"metrics": {"anls": rate(0.5, 0.4, 0.6)}, "evaluation_loss": 1.0}
    of_train = evaluation(10, 0.5) | {"split": "train"}
    page = render([step(1)], summary=summary, evaluations=[of_train], examples=())
    assert "held-out" not in page.text.lower() and "Training metrics" in page.text
    assert "Training loss (lower is better) by step" in charts(page)
    of_both = [evaluation(5, 0.5) | {"split": "validation"}, of_train]
    page = render([step(1)], summary=summary, evaluations=of_both, examples=())
    assert "Evaluated loss (lower is better) by step" in charts(page)
    page = render([step(1)], summary=summary, evaluations=of_both[::-1], examples=())
    assert "Held-out metrics" in page.text


def test_a_blind_metric_without_its_partner_keeps_its_row(render):
    text = render(summary={"metrics": {"blind_parse_rate": rate(0.5, 0.4, 0.6)}}).text
    assert "blind_parse_rate" in text and "50.0%" in text


def test_a_metric_that_is_no_rate_is_shown_as_a_number(render):
    text = render(summary={"metrics": {"price_mae": rate(1.23456, 1.2, 1.3)}}).text
    assert "1.235" in text and "123" not in text.replace("1.235", "")


def charts(page: Page) -> list[str]:
    return [svg["aria-label"] for svg in page.all("svg") if "aria-label" in svg]


def test_there_is_one_chart_for_each_thing_measured(render):
    page = render([step(n) for n in range(1, 30)])
    assert len(charts(page)) == 7  # neither mfu nor norms by module
    assert len(charts(render([step(1, mfu=0.4, grad_norms={"head": 1.0})]))) == 9
    bare = [{"step": n, "epoch": 0, "loss": 1.0, "grad_norm": None} for n in (1, 2)]
    assert charts(render(bare)) == ["Loss by step"]


def test_identical_learning_rates_share_one_curve(render):
    same = render([step(n) for n in range(1, 30)])
    assert "Learning rate, the same for all modules" in same.text
    other = render([step(n, lr={"language": 2e-3, "head": 2e-3, "vision": 1e-3}) for n in (1, 2)])
    assert "language, head" in other.text and "vision" in other.text


def test_pictures_are_small_jpegs_and_answers_are_marked_in_words(render):
    page = render()
    (image,) = page.all("img")
    picture = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
    assert (picture.format, picture.size) == ("JPEG", (200, 150))
    assert "no picture" in page.text and "not asked" in page.text
    assert "\u2717 wrong" in page.text and "\u2713 right" in page.text
    assert "1 of the 2 shown are right" in page.text


def test_a_shared_prompt_is_shown_once_and_others_with_their_row(render):
    text = render().text
    assert text.count("[image] What is it?") == 1 and "<|" not in text
    other = Example(
        None,
        "<|user|>\nAnd?<|end|>\n<|assistant|>\nSo.<|end|>\n<|user|>\nYes?",
        "x",
        "y",
        None,
        False,
    )
    text = render(examples=[*EXAMPLES, other]).text
    assert text.count("What is it?") == 2
    assert text.count(other.prompt) == 1, "of several turns the template tells who speaks"


def test_a_row_has_its_id_and_its_scores(render):
    text = render().text
    for shown in ("row-<7>", "title_similarity 12.5%", "price_mae 1,234"):
        assert shown in text
    assert text.count("price_mape") == 1, "only in the table of metrics, for the row has no value"


def test_every_section_is_there_in_order_and_linked(render):
    page = render(report=replace(FULL, summary=SUMMARY | {"throughput": {"steps": 3}}))
    assert tuple(section["id"] for section in page.all("section")) == SECTIONS
    assert tuple(link["href"] for link in page.all("a")) == tuple(f"#{n}" for n in SECTIONS)


def test_evaluations_are_drawn_with_interval_and_blind_control(render):
    page = render(report=FULL)
    assert charts(page)[:2] == [
        "Held-out loss (lower is better) by step",
        "exact_match (higher is better) by step",
    ]
    figure = page.source.split("<figure>")[2]
    assert figure.count("<polyline") == 2 and figure.count(" span") == 2
    assert "held-out</span>" in figure and "blind control</span>" in figure


def test_an_evaluation_without_a_score_has_no_point(render):
    lines = [evaluation(10, 0.25), evaluation(20, 0.5, exact_match=rate(None, None, None, 0))]
    figure = render(evaluations=lines).source.split("<figure>")[2]
    assert figure.count("<circle") == 1 and figure.count("<polyline") == 1


def test_the_data_is_told_by_dataset_and_split(render):
    page = render(report=FULL)
    for shown in ("2,700", "187,001", "2,711", "20,801", "not counted"):
        assert shown in page.text
    rejected = "12 rows were rejected: image cannot be read (9), too many tokens (3)."
    assert rejected in page.text
    assert "64 to 71: 9 samples" in page.text and "72 to 79: 0 samples" in page.text
    assert len([name for name in charts(page) if "samples by tokens" in name]) == 1


def test_checkpoints_and_faults_are_listed(render):
    text = render(report=FULL).text
    for shown in ("2026-11-21 21:00:00", "50.123", "latest, best"):
        assert shown in text
    for shown in ("the loss is not finite", "back to 5", "2 steps are left out"):
        assert shown in text


def test_a_long_list_shows_its_newest_lines_and_says_so(render):
    faults = [{"step": n, "reason": f"reason {n};", "loss": 9.0} for n in range(1, 91)]
    text = render(faults=faults).text
    assert "40 earlier lines are left out" in text
    assert "reason 41;" in text and "reason 40;" not in text


def test_the_page_says_when_it_was_written_in_utc(render):
    assert re.search(r"Written 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC", render().text)


def test_the_page_of_a_huge_run_stays_small(render, tmp_path):
    """20,000 steps, 500 evaluations of 12 metrics, and pictures, answers and a recipe at worst."""
    noise = np.random.default_rng(0).integers(0, 256, (1344, 1344, 3), dtype=np.uint8)
    worst = Example(noise, "p" * 10**6, "&" * 10**6, "x" * 10**6, "y" * 10**6, False)
    names = ("exact_match", "anls", "rouge_l", "bleu", "accuracy", "relaxed_accuracy")
    scores = {f"{blind}{n}": rate(0.5, 0.4, 0.6) for n in names for blind in ("", "blind_")}
    modules = ("vision", "projector", "embedding", "language", "head")
    wave = [1.0 + math.sin(n) for n in range(20_000)]
    norms = [{name: value for name in modules} for value in wave]
    render(
        steps=[step(n + 1, loss=x, mfu=x, grad_norms=norms[n]) for n, x in enumerate(wave)],
        examples=[worst] * 500,
        evaluations=[{"step": n, "loss": 1.0 + n % 7, "metrics": scores} for n in range(500)],
        data=[DATA] * 100,
        checkpoints=FULL.checkpoints * 100,
        files={"config.yaml": "&" * 10**6},
    )
    size = (tmp_path / "report.html").stat().st_size
    assert size < MOST_BYTES


def test_small_learning_rates_have_short_ticks():
    chart = line_chart("Rate", [Curve("lr", [(1, 0.0), (2, 1e-3)])])
    assert ">2e-4<" in chart and ">1e-3<" in chart and ">0<" in chart
    chart = line_chart("Rate", [Curve("lr", [(1, 0.0), (2, 3e-3)])])
    assert ">1e-3<" in chart and ">2e-3<" in chart and ">3e-3<" in chart


def test_an_axis_of_shares_ends_at_all_of_them():
    chart = line_chart("Rate", [Curve("x", [(1, 1.0), (2, 1.0)])], is_percent=True)
    assert ">100%<" in chart and ">105%<" not in chart


@pytest.mark.parametrize("is_percent", [False, True])
def test_an_axis_of_what_is_never_negative_does_not_go_below_zero(is_percent):
    for points in ([(1, 0.0), (2, 0.0)], [(1, 0.0)]):
        chart = line_chart("Rate", [Curve("x", points)], is_percent)
        assert ">0%<" in chart if is_percent else ">0<" in chart
        assert not re.search(r">-[\d.]+%?<", chart)


def test_the_left_margin_holds_the_longest_label():
    """62.5% takes 55 units on a phone: four digits and marks, and a wide percent sign."""
    assert left_margin(["0%", "62.5%"]) > 55 > left_margin(["0%", "50%"])
    chart = line_chart("Rate", [Curve("x", [(1, 0.61), (2, 0.63)])], is_percent=True)
    left = float(re.search(r'class="grid" d="M([\d.]+) ', chart)[1])
    assert left == pytest.approx(left_margin(["61.5%"]))
    bars = bar_chart("Samples", [Bar("1", 12_300, "")], "tokens")
    assert f"M{left_margin(['12.3k']):g} " in bars


def test_the_first_of_several_lines_is_broad_and_rings_grow():
    """So both are seen where the held-out line and its blind control coincide."""
    flat = [(1, 0.5), (2, 0.5)]
    both = line_chart("x", [Curve("held-out", flat), Curve("blind", flat)])
    assert both.count('<svg class="several"') == 1
    assert "several" not in line_chart("x", [Curve("held-out", flat)])
    rings = line_chart("x", [Curve("held-out", flat[:1]), Curve("blind", flat[:1])])
    assert len(set(re.findall(r' r="([\d.]+)"', rings))) == 2


def test_the_axis_of_a_single_step_shows_whole_steps():
    chart = line_chart("x", [Curve("x", [(4, 1.0)])])
    assert ">4<" in chart and ">3.6<" not in chart


def test_the_blind_column_is_left_out_where_nothing_was_asked_blind(render):
    assert "blind prediction" in render().text
    assert "blind prediction" not in render(examples=EXAMPLES[1:]).text


def test_totals_and_settings_are_listed(render):
    text = render().text
    for shown in ("8,123,456", "441 GFLOP", "time in steps28 s", "1.235", "models/<tiny>"):
        assert shown in text
    assert "runs/<x>" not in text, "where the run lay says nothing to a colleague"


@pytest.mark.parametrize(
    ("flops", "text"),
    [(0.0, "0 FLOP"), (999.9e9, "1 TFLOP"), (4.40899e11, "441 GFLOP"), (2.43e19, "24.3 EFLOP")],
)
def test_operations_are_told_in_a_few_digits(flops, text):
    assert operations(flops) == text


def test_the_throughput_is_told_without_what_was_not_measured(render):
    figures = {
        "warmup_steps": 2,
        "steps": 1198,
        "seconds": 7260.0,
        "tokens_per_second": 12345.6,
        "views_per_second": 78.91,
        "mfu": None,
        "packing": 0.9912,
        "data_wait": 0.0034,
    }
    text = render(summary={"throughput": figures}).text
    for shown in ("1,198", "2 h 01 min", "12,346", "78.9", "99.1%", "0.34%", "kernels compile"):
        assert shown in text
    assert "utilisation" not in text and "balance" not in text
    assert "Throughput" not in render(summary={}).text


def test_a_run_without_anything_still_gives_a_page(render):
    page = render(report=Report(title="products & more"))
    assert not page.all("svg") and not page.all("table") and "products & more" in page.text


def test_values_that_are_no_number_do_not_reach_a_chart(render):
    lines = [step(1), step(2, loss=None), step(3, loss=math.inf), step(4, loss=math.nan), step(5)]
    source = render(lines).source
    assert "nan" not in source and not re.search(r'points="[^"]*inf', source)


def test_the_key_facts_sum_up_the_steps(render):
    steps = [step(n, step_seconds=60.0, loss=2.0) for n in range(1, 121)]
    text = render(steps, epochs=8.04).text
    for shown in ("120steps", "8.0epochs", "2loss, mean of the last 20 steps", "2 h 00 min"):
        assert shown in text
    assert "epochs" not in render(steps).text, "left out where unknown"


def test_the_file_is_replaced_whole_and_nothing_is_left_beside_it(render, tmp_path, monkeypatch):
    before = render().source
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        render(steps=[step(1)])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before


# --- charts ---


def test_a_long_curve_is_thinned_but_keeps_its_spike():
    points = [(float(n), 1.0) for n in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    chart = line_chart("Loss", [Curve("loss", points)])
    assert len(chart) < 20_000
    heights = [float(y) for y in re.findall(r",([\d.]+)", chart.partition("points=")[2])]
    assert max(heights) - min(heights) > 100  # of 200 units


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-9, 1e12])
def test_a_flat_curve_or_a_single_point_has_an_axis(value):
    assert "<polyline" in line_chart("x", [Curve("x", [(1, value), (2, value)])])
    assert "<circle" in line_chart("x", [Curve("x", [(1, value)])])


def test_a_chart_without_points_is_no_chart():
    assert line_chart("x", [Curve("x", []), Curve("y", [])]) == ""


def test_smoothing_keeps_a_constant_and_does_not_lag_behind_a_slope():
    assert smooth([(n, 3.0) for n in range(200)]) == [(n, 3.0) for n in range(200)]
    slope = smooth([(n, float(n)) for n in range(200)])
    assert slope[:190] == [(n, float(n)) for n in range(190)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0512, "0.0512"),
        (2e-5, "2e-5"),
        (1234.5, "1,234"),
        (15000, "15k"),
        (2.1e7, "21M"),
        (999_999, "1M"),
    ],
)
def test_short_numbers(value, text):
    assert short_number(value) == text
