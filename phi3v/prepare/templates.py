"""Templates: texts of a recipe that columns of a row fill.

    {title}            the column's value as text
    {query.en}         what stands within it
    {answers[0]}       an item of a list; {choices[answer]}: the one whose number the column holds
    {hint?}            nothing where the column is empty; a line of nothing else, or of a label
                       (Hint: {hint?}), is left out
    {choices:letters}  a list, line by line: A. red; B. blue; {answer:letter}: 1 is B
    {tags:commas}      a list, joined by commas

A column of exactly the name in the braces comes first. A number is written as Python writes it: an
int 12, a float 12.5, a decimal 12.50; so are True and False, 2024-05-01 and 2024-05-01 12:00:00.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from functools import lru_cache
from math import isinf
from numbers import Real
from string import ascii_uppercase
from typing import Any

import numpy as np

from phi3v.errors import SampleError
from phi3v.prepare.rows import ClassName
from phi3v.processing.keys import is_empty

FIELD = re.compile(r"\{(\w[^{}]*)\}")  # {title}, {Full Price}; not {"title": 1}
STEP = re.compile(r"\.([^.\[\]]+)|\[([^\[\].]*)\]")
NESTED = re.compile(rf"([^.\[\]]+)(?:{STEP.pattern})+")  # answers[0], query.en, pages[1].text
FORMS = ("letters", "letter", "commas")
LABEL = re.compile(r"(?:[^:.?!<>|]*:)?\W*")  # what may go with an empty field: "Hint: ", "()"
PLAIN = (str, Real, Decimal, date, time, timedelta, np.bool_, np.datetime64, np.timedelta64)
"""Types of values that have a text; np.float32 and np.int64 are Real."""

FILLED = "\0"  # stands for a field while what is left of a template is looked at
OPEN = re.compile(r"\{(?!\s*[\"'])")  # an object of JSON begins with the quote of a key


@dataclass(frozen=True)
class Name:
    """What stands between braces: where a value is, how it is written, whether it may lack."""

    path: str
    form: str = ""
    is_optional: bool = False


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Name:
    path = text.removesuffix("?")
    head, _, form = path.rpartition(":")
    if form in FORMS:
        return Name(head, form, path != text)
    return Name(path, "", path != text)


def parse(text: str, columns: Collection[str]) -> Name:
    """Read what stands between braces, or a name in `images`: {hint?} is an optional `hint`."""
    return Name(text) if text in columns else _parsed(text)


def head_of(path: str, columns: Collection[str]) -> str:
    """The column that {answers[0]} or {query.en} starts from; any name, if there is one of it."""
    nested = None if path in columns else NESTED.fullmatch(path)
    return nested[1] if nested else path


def columns_of(text: str, columns: Collection[str]) -> Iterator[str]:
    """The columns that a name needs: {choices[answer]} needs choices and answer."""
    path = parse(text, columns).path
    head = head_of(path, columns)
    yield head
    for _, index in STEP.findall(path[len(head) :]):
        if index and not index.isdecimal():
            yield index


def fill(template: str, values: Mapping[str, Any]) -> str:
    """Fill a template.

    Raises: SampleError if a column is empty, or holds what is no text.
    """
    if "?}" not in template:
        return FIELD.sub(lambda match: _text(values, match[1]), template)
    lines = (_filled_line(line, values) for line in template.split("\n"))
    return "\n".join(line for line in lines if line is not None)


def _filled_line(line: str, values: Mapping[str, Any]) -> str | None:
    """A line filled; None if it says nothing where all that fills it is optional and empty."""
    names = FIELD.findall(line)
    texts = [_text(values, name) for name in names]
    if names and not any(texts) and all(parse(name, values).is_optional for name in names):
        own = FIELD.sub("", line).strip()
        return None if LABEL.fullmatch(own) else own
    left = iter(texts)
    return FIELD.sub(lambda _: next(left), line)


def _text(values: Mapping[str, Any], text: str) -> str:
    name = parse(text, values)
    value = find(values, name.path)
    if is_empty(value):
        if name.is_optional:
            return ""
        raise SampleError(f"column '{name.path}' is empty")
    if name.form:
        return _formed(name, value)
    if not isinstance(value, PLAIN):
        raise SampleError(
            f"column '{text}' is no text: a {type(value).__name__}; a list's first is {{{text}[0]}}"
            f", a field {{{text}.name}}, a list in a line {{{text}:commas}}"
        )
    return _plain(name.path, value)


def _plain(path: str, value: Any) -> str:
    if isinstance(value, Real | Decimal) and isinf(value):
        raise SampleError(f"column '{path}' is not finite: {value}; leave it empty")
    return format(value, "f") if isinstance(value, Decimal) else str(value)


def _formed(name: Name, value: Any) -> str:
    if name.form == "letter":
        return _letter(name.path, value)
    is_list = isinstance(value, list)
    if not is_list or any(not isinstance(item, PLAIN) for item in value if item is not None):
        raise SampleError(f"column '{name.path}' is not a list of texts, as :{name.form} needs")
    if empty := [place for place, item in enumerate(value) if is_empty(item)]:
        raise SampleError(f"column '{name.path}' has nothing at place {empty[0]} of its list")
    items = [_plain(name.path, item) for item in value]
    if name.form == "commas":
        return ", ".join(items)
    return "\n".join(f"{_letter(name.path, k)}. {item}" for k, item in enumerate(items))


def _letter(path: str, value: Any) -> str:
    """0 is A; a text that says 0 is A too, as of a CSV."""
    index = _index(value)
    if index is None or index >= len(ascii_uppercase):
        raise SampleError(f"column '{path}' is no place of a letter, 0 to 25: {value!r}")
    return ascii_uppercase[index]


def _index(value: Any) -> int | None:
    """A place in a list, from 0; None for what is none."""
    if isinstance(value, ClassName):
        value = value.id
    if isinstance(value, str) and value.isdecimal() and value.isascii():
        value = int(value)
    is_whole = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
    return int(value) if is_whole and value == int(value) else None


def find(values: Mapping[str, Any], path: str) -> Any:
    """A column's value, or what stands within it: query.en of {"query": {"en": "Hi"}} is Hi.

    `answers[].text` is the list of the texts of all answers, with None in the place of one that has
    none, [] where no answer has. None where there is nothing.
    """
    head = head_of(path, values)
    steps = STEP.findall(path[len(head) :]) if head != path else []
    return _within(values.get(head), steps, values, path)


def _within(value: Any, steps: list[tuple[str, str]], values: Mapping[str, Any], path: str) -> Any:
    for number, (name, index) in enumerate(steps):
        if name:
            value = _member(value, name)
        elif not index and isinstance(value, list):
            rest = steps[number + 1 :]
            found = [_within(item, rest, values, path) for item in value]
            return [] if all(map(is_empty, found)) else found
        else:
            value = _item(value, index, values)
    return value


def _member(value: Any, name: str) -> Any:
    if isinstance(value, ClassName) and name == "id":
        return value.id
    return value.get(name) if isinstance(value, dict) else None


def _item(value: Any, index: str, values: Mapping[str, Any]) -> Any:
    """An item of a list by its number, or by the number that a column holds."""
    place = int(index) if index.isdecimal() else _index(values.get(index))
    is_there = isinstance(value, list) and place is not None and place < len(value)
    return value[place] if is_there else None


def left_over(template: str) -> str | None:
    """What looks like a field of a template and is none: `{ title }`, `{{`, `{choices[{answer}]}`.

    Objects of JSON may stand in it: {"title": "{title}"}.
    """
    rest = FIELD.sub(FILLED, template)
    if match := OPEN.search(rest):
        start = match.start()
        end = rest.find("}", start)
        return _shown(template, rest, start, end if end >= 0 else len(rest))
    depth = 0
    for place, char in enumerate(rest):
        depth += (char == "{") - (char == "}")
        if depth < 0:
            return _shown(template, rest, max(0, place - 1), place)
    return None


def _shown(template: str, rest: str, start: int, end: int) -> str:
    """The part of a template that became rest[start:end + 1]."""
    fields = FIELD.findall(template)
    before, part = rest[:start].count(FILLED), rest[start : end + 1]
    for name in fields[before : before + part.count(FILLED)]:
        part = part.replace(FILLED, f"{{{name}}}", 1)
    return part
