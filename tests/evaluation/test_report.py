"""The page stands alone, says all it was given, and survives runs that measured little."""

import base64
import io
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from phi3v.evaluation.charts import Curve, line_chart, short_number, smooth
from phi3v.evaluation.report import Example, write_report
from tests.page import Page


def step(number: int, **changes) -> dict:
    line = {
        "step": number,
        "epoch": number / 10,
        "loss": 8.0 / number,
        "grad_norm": 1.0,
        "lr": {"language": 1e-3 / number, "vision": 1e-3 / number},
        "tokens_per_second": 5000.0 + number,
        "step_seconds": 1.5,
        "data_wait_seconds": 0.01,
        "packing": 0.97,
        "balance": 0.9,
        "mfu": None,
        "memory_gb": 3.0,
    }
    return line | changes


def rate(value: float | None, low: float | None, high: float | None, n: int = 256) -> dict:
    return {"value": value, "low": low, "high": high, "n": n}


SUMMARY = {
    "metrics": {
        "category_accuracy": rate(0.9219, 0.8867, 0.9531),
        "price_mape": rate(0.0812, 0.0641, 0.1011, 255),
        "title_exact_match_unseen": rate(None, None, None, 0),
        "blind_category_accuracy": rate(0.125, 0.0859, 0.168),
    },
    "totals": {"tokens": 8123456},
    "seconds": 1523.25,
    "export": "runs/<x>",
}
PICTURE = np.full((300, 400, 3), 128, dtype=np.uint8)
EXAMPLES = [
    Example(
        PICTURE, "What is it?", "A bag & a <b>belt</b>", "A <script>x</script>", "A tie", False
    ),
    Example(None, "What is it?", "A tie", "A tie", None, True),
]
FACTS = {"model": "models/<tiny>"}


@pytest.fixture
def render(tmp_path: Path):
    def run(steps=(), summary=SUMMARY, examples=EXAMPLES, facts=FACTS) -> Page:
        path = tmp_path / "report.html"
        write_report(path, "products & more", list(steps), summary, examples, facts)
        return Page(path.read_text(encoding="utf-8"))

    return run


def test_the_page_needs_nothing_from_outside(render):
    page = render([step(n) for n in range(1, 30)])
    links = [a[key] for _, a in page.tags for key in ("src", "href", "srcset") if key in a]
    assert links and all(link.startswith("data:image/jpeg;base64,") for link in links)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    assert "url(" not in page.source and "@import" not in page.source
    assert "default-src 'none'" in page.source


def test_everything_from_the_run_is_escaped(render):
    page = render()
    assert "<script" not in page.source and "<b>belt" not in page.source
    for text in ("A <script>x</script>", "A bag & a <b>belt</b>", "models/<tiny>", "runs/<x>"):
        assert text in page.text
    assert page.text.count("products & more") == 2  # title and heading


def test_every_metric_is_shown_with_interval_n_and_blind_control(render):
    text = render().text
    row = text[text.index("category_accuracy") : text.index("price_mape")]
    for shown in ("92.2%", "88.7% \u2013 95.3%", "n = 256", "12.5%", "8.6% \u2013 16.8%"):
        assert shown in row
    assert "8.1%" in text and "n = 255" in text and "lower is better" in text
    assert "no rows" in text and "only values that never occur in training" in text
    assert "blind_category_accuracy" not in text  # a column, not a row
    assert "has learnt the text and not the picture" in text.replace("\n", " ")


def test_a_blind_metric_without_its_partner_keeps_its_row(render):
    text = render(summary={"metrics": {"blind_parse_rate": rate(0.5, 0.4, 0.6)}}).text
    assert "blind_parse_rate" in text and "50.0%" in text


def test_a_metric_that_is_no_rate_is_shown_as_a_number(render):
    text = render(summary={"metrics": {"loss": rate(1.23456, 1.2, 1.3)}}).text
    assert "1.235" in text and "123" not in text.replace("1.235", "")


def test_there_is_one_chart_for_each_thing_measured(render):
    page = render([step(n) for n in range(1, 30)])
    assert len(page.all("svg")) == 7  # no mfu
    assert len(render([step(1, mfu=0.4)]).all("svg")) == 8
    bare = [{"step": n, "epoch": 0, "loss": 1.0, "grad_norm": None} for n in (1, 2)]
    assert [svg["aria-label"] for svg in render(bare).all("svg")] == ["Loss by step"]


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
    assert render().text.count("What is it?") == 1
    other = Example(None, "And this?", "x", "y", None, False)
    text = render(examples=[*EXAMPLES, other]).text
    assert text.count("What is it?") == 2 and text.count("And this?") == 1


def test_the_blind_column_is_left_out_where_nothing_was_asked_blind(render):
    assert "blind prediction" in render().text
    assert "blind prediction" not in render(examples=EXAMPLES[1:]).text


def test_totals_and_settings_are_listed(render):
    text = render().text
    for shown in ("8,123,456", "1,523.25", "models/<tiny>"):
        assert shown in text


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
    page = render(steps=[], summary={}, examples=[], facts={})
    assert not page.all("svg") and not page.all("table") and "products & more" in page.text


def test_values_that_are_no_number_do_not_reach_a_chart(render):
    lines = [step(1), step(2, loss=None), step(3, loss=math.inf), step(4, loss=math.nan), step(5)]
    source = render(lines).source
    assert "nan" not in source and not re.search(r'points="[^"]*inf', source)


def test_the_key_facts_sum_up_the_steps(render):
    text = render([step(n, step_seconds=60.0, loss=2.0) for n in range(1, 121)]).text
    for shown in ("120steps", "12epochs", "2loss, mean of the last 20 steps", "2 h 00 min"):
        assert shown in text


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
    ],
)
def test_short_numbers(value, text):
    assert short_number(value) == text
