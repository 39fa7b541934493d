"""A metric of the user's own: what it is given, what it may give, and that each mistake is told."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from phi3v.config.running import EvalSection
from phi3v.errors import ConfigError
from phi3v.evaluation.comparison import compare_models
from phi3v.evaluation.evaluate import evaluate
from phi3v.evaluation.generation import Generator
from phi3v.evaluation.held_out import open_held_out
from phi3v.evaluation.metrics import Answer, compare, find_metrics, score
from phi3v.evaluation.metrics.own import _call, own_value, takes_prompt
from phi3v.evaluation.models import open_model
from phi3v.functions import find_function
from tests.evaluation.knowing import knowing

NAME = "strange_metrics:f"
ANSWER = Answer("r7", "cap", "bag", ("cap", "hat"), prompt="What is it?")
Write = Callable[[str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a module into the current folder, which alone holds it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])

    def forget() -> None:
        sys.modules.pop("strange_metrics", None)
        for cache in (find_function, takes_prompt, _call):
            cache.cache_clear()

    def write(text: str) -> None:
        (tmp_path / "strange_metrics.py").write_text(text, encoding="utf-8")
        forget()

    yield write
    forget()


def test_it_is_given_the_answer_all_references_and_the_prompt_if_it_asks(write: Write) -> None:
    write("def f(said, right):\n    return (said, right) == ('bag', ('cap', 'hat'))\n")
    assert own_value(NAME, ANSWER) == 1.0
    assert own_value(NAME, replace(ANSWER, references=())) == 0.0, "then the reference alone"
    write("def f(said, right, *, prompt, weight=1):\n    return prompt == 'What is it?'\n")
    assert own_value(NAME, ANSWER) == 1.0
    write("def f(said, right, threshold=0.5):\n    return threshold\n")
    assert own_value(NAME, ANSWER) == 0.5, "no other parameter is filled in"


def test_whatever_python_calls_a_number_from_0_to_1_is_one(write: Write) -> None:
    for text in ("True", "1", "1.0", "np.float32(1)", "np.bool_(True)", "np.int64(1)"):
        write(f"import numpy as np\ndef f(said, right):\n    return {text}\n")
        assert own_value(NAME, ANSWER) == 1.0


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (
            "return None",
            "gave None, a NoneType, for row 'r7'; it is to give a number from 0 to 1, ",
        ),
        ("return '1'", "gave '1', a str, for row 'r7'; "),
        ("return 1j", "gave 1j, a complex, for row 'r7'; "),
        ("return float('nan')", "gave nan for row 'r7'; it is to give a number from 0 to 1, of w"),
        ("return 1.5", "gave 1.5 for row 'r7'; "),
        ("return -0.1", "gave -0.1 for row 'r7'; "),
        ("return {}['x']", "raised KeyError, 'x', for row 'r7' (line 2 of "),
    ],
)
def test_what_is_no_number_from_0_to_1_is_refused_with_its_row(
    write: Write, body: str, fault: str
) -> None:
    write(f"def f(said, right):\n    {body}\n")
    with pytest.raises(ConfigError) as caught:
        score([NAME], [ANSWER], None)
    assert str(caught.value).startswith(f"eval.metrics {NAME} {fault}")


@pytest.mark.parametrize(
    ("text", "name", "fault"),
    [
        ("", NAME, f"eval.metrics {NAME}: module strange_metrics has no function 'f' (it is "),
        ("f = 5", NAME, f"eval.metrics {NAME}: module strange_metrics has no function 'f' (it is "),
        ("f = 5 +", NAME, f"eval.metrics {NAME} cannot be imported: SyntaxError, "),
        ("import sys; sys.exit(3)", NAME, f"eval.metrics {NAME} cannot be imported: SystemExit, 3"),
        ("", "nowhere:f", "eval.metrics nowhere:f cannot be imported: ModuleNotFoundError, "),
        ("", ":f", "eval.metrics :f cannot be imported: ValueError, "),
        ("", "strange_metrics:", "eval.metrics strange_metrics:: module strange_metrics has no "),
        ("def f(a): pass", NAME, f"eval.metrics {NAME} takes (a): too many positional arguments; "),
        (
            "def f(a, b, c): pass",
            NAME,
            f"eval.metrics {NAME} takes (a, b, c): missing a required argument: 'c'; write one of ",
        ),
        ("f = dict", NAME, f"eval.metrics {NAME} does not say what it takes; write one of "),
    ],
)
def test_a_function_that_is_not_there_or_takes_something_else_is_refused_by_its_name(
    write: Write, text: str, name: str, fault: str
) -> None:
    write(text)
    with pytest.raises(ConfigError) as caught:
        find_metrics(["exact_match", name], None)
    assert str(caught.value).startswith(fault)


def test_a_function_that_fails_for_a_right_answer_is_refused_before_anything_starts(
    write: Write, tiny_shards: Path
) -> None:
    shards = [str(tiny_shards.absolute())]
    write("def f(said, right):\n    return len(said)\n")
    with pytest.raises(ConfigError, match=rf"eval.metrics {NAME} gave \d+\.0 for row '\w+'; "):
        open_held_out(shards, EvalSection(metrics=(NAME,)))
    write("def f(said, right, prompt):\n    return len(prompt)\n")  # nothing is asked yet
    open_held_out(shards, EvalSection(metrics=(NAME,)))


def test_it_has_an_interval_controls_and_a_comparison_as_any_other(
    write: Write, tiny_shards: Path, tiny_model: Path
) -> None:
    """And it is called once for each answer, however many figures are made of it."""
    write(
        "calls = []\n"
        "def f(said, right):\n"
        "    calls.append((said, right))\n"
        "    return float(said in right)\n"
    )
    generator: Generator = open_model(tiny_model.absolute(), 4, 8)
    settings = EvalSection(rows=8, metrics=("exact_match", NAME, f"{NAME}_unseen"))
    folders = [str(tiny_shards.absolute())]
    dataset = open_held_out(folders, settings)
    told = knowing(generator, [dataset[row] for row in range(len(dataset))])
    models = {"base": evaluate(generator, folders, settings)}
    models["told"] = evaluate(told, folders, settings)
    for name in ("", "blind_", "constant_"):
        for model in models.values():
            mine, theirs = model.scores[f"{name}{NAME}"], model.scores[f"{name}exact_match"]
            assert mine == theirs and mine.n == 8
    assert models["told"].scores[NAME].value == 1.0
    (pair,) = compare_models(models, folders, settings)
    assert pair.differences[NAME] == pair.differences["exact_match"]
    assert pair.verdict(NAME) == "told is better"
    calls = sys.modules["strange_metrics"].calls
    assert len(calls) == len(set(calls))


def test_two_models_are_compared_by_it(write: Write) -> None:
    write("def f(said, right):\n    return 1 - abs(len(said) - len(right[0])) / 10\n")
    a = [Answer(f"r{n}", "12345", "1" * (n % 3)) for n in range(20)]
    b = [replace(answer, prediction="12345") for answer in a]
    found = compare([NAME], a, b, None)[NAME]
    assert found.value == pytest.approx(sum((5 - n % 3) / 10 for n in range(20)) / 20)
