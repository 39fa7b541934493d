"""Files of JSON lines: whatever cuts them or is typed into them, whole records stay whole."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phi3v.errors import CheckpointError, ShardError
from phi3v.lines import (
    append_line,
    line_of,
    numbered_lines,
    parse_line,
    read_lines,
    write_lines,
)

ODD = '\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e\r\n\0\ud800\udfff\ufeff"\\'
TEXTS = st.text(st.one_of(st.sampled_from(ODD), st.characters(exclude_categories=())), max_size=9)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
RECORDS = st.lists(st.dictionaries(TEXTS, VALUES, max_size=3), max_size=5)
many = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def as_read(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two halves of a surrogate pair that were typed one by one are read as the pair."""
    found: list[dict[str, Any]] = json.loads(json.dumps(records))
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.jsonl"


@many
@given(
    before=RECORDS,
    after=RECORDS,
    cut=st.integers(0, 2000),
    junk=st.binary(max_size=40),
    data=st.data(),
)
def test_what_was_whole_stays_and_what_is_appended_after_a_crash_is_read_back(
    path: Path, before: list[Any], after: list[Any], cut: int, junk: bytes, data: st.DataObject
) -> None:
    """Cut at any byte; the end is bytes without a line's end, or a block that is NULs in part."""
    path.unlink(missing_ok=True)
    for record in before:
        append_line(path, record)
    lines = [line_of(record) for record in before]
    whole = b"".join(lines)[:cut]
    kept = whole.count(b"\n")
    with_nul = data.draw(st.booleans())
    end = junk.replace(b"\n", b"\0\n") + b"\0" * 7 if with_nul else junk.replace(b"\n", b"")
    path.write_bytes(whole + end)
    torn = path.read_bytes()
    assert read_lines(path) == as_read(before[:kept])
    assert path.read_bytes() == torn, "who reads must not write"
    for record in after:
        append_line(path, record)
    assert read_lines(path) == as_read(before[:kept] + after)


@many
@given(junk=st.lists(st.binary(max_size=30), max_size=5), after=RECORDS.filter(bool))
def test_of_any_bytes_a_file_is_read_or_refused_by_the_number_of_a_line(
    path: Path, junk: list[bytes], after: list[Any]
) -> None:
    """And an append leaves all whole lines as they are."""
    path.write_bytes(b'{"a": 1}\n' + b"\n".join(junk))
    before = path.read_bytes()
    for record in after:
        append_line(path, record)
    appended = b"".join(map(line_of, after))
    assert path.read_bytes().endswith(appended)
    left = path.read_bytes()[: -len(appended)]
    assert before.startswith(left) and left.endswith(b"\n")
    assert all(b"\0" in line for line in before[len(left) :].split(b"\n")[:-1])
    try:
        found = read_lines(path)
    except CheckpointError as error:
        assert " is damaged: line " in str(error)
    else:
        assert found[:1] == [{"a": 1}] and found[-len(after) :] == as_read(after)


@many
@given(value=st.dictionaries(TEXTS, VALUES, max_size=4))
def test_a_line_is_one_line_to_every_program(value: dict[str, Any]) -> None:
    text = line_of(value).decode()  # it is UTF-8
    assert len(text.splitlines()) == 1 and "\0" not in text
    assert json.loads(text) == json.loads(json.dumps(value))


def test_a_torn_end_is_said_once_when_it_is_cut_off(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_bytes(b'{"step": 1}\n{"step": 2, "hi')
    append_line(path, {"step": 2})
    append_line(path, {"step": 3})
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]
    assert capsys.readouterr().err == (
        f"{path}: its last 15 bytes are no whole line, as a crash or a full disk leaves one, and "
        "are cut off\n"
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": {"a": 1}', "is not JSON: Expecting ',' delimiter, column 15"),
        (b'{"a": "\xff"}', "is not UTF-8: byte 8"),
        (b"[1]", "is a list, not an object of JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is not JSON that can be read: "),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON that can be read: Exceeds the limit"),
        (b'{"a\0": 1}', "is not JSON: Invalid control character at, column 4"),
    ],
)
def test_a_damaged_line_in_the_middle_is_refused_by_its_number(
    path: Path, line: bytes, reason: str
) -> None:
    path.write_bytes(b'{"a": 0}\n\n' + line + b'\n{"a": 1}\n')
    with pytest.raises(ShardError) as caught:
        read_lines(path, ShardError)
    assert str(caught.value).startswith(f"{path} is damaged: line 3 {reason}")
    assert str(caught.value).endswith("; bring the file back from a copy, or remove that line")


@pytest.fixture
def small_files() -> Iterator[None]:
    """This process writes no byte beyond the 20th of a file, as on a disk that is full there."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_line_that_does_not_fit_on_the_disk_leaves_nothing_of_itself(
    path: Path, small_files: None
) -> None:
    append_line(path, {"step": 1})
    with pytest.raises(OSError, match="File too large") as caught:
        append_line(path, {"step": 2, "text": "long"})
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b'{"step": 1}\n'
    assert read_lines(path) == [{"step": 1}]


def test_a_file_of_lines_is_written_whole_or_not_at_all(path: Path) -> None:
    assert read_lines(path) == []
    write_lines(path, [{"a": "\u2028"}, {"b": None}])
    assert read_lines(path) == [{"a": "\u2028"}, {"b": None}]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_lines(path, [{"a": 1}, {"a": float("nan")}])
    assert read_lines(path) == [{"a": "\u2028"}, {"b": None}]
    assert list(path.parent.iterdir()) == [path]


def test_lines_that_hold_something_have_their_numbers(path: Path) -> None:
    path.write_bytes('{"a": "x\u2028y"}\r\n  \n\n{"b": 2}'.encode())
    assert list(numbered_lines(path)) == [(1, '{"a": "x\u2028y"}\r\n'.encode()), (4, b'{"b": 2}')]
    assert [parse_line(line) for _, line in numbered_lines(path)] == [{"a": "x\u2028y"}, {"b": 2}]


def test_a_block_of_nuls_at_the_end_is_no_record_though_its_line_has_an_end(path: Path) -> None:
    path.write_bytes(b'{"a": 1}\n{"a": ' + b"\0" * 90_000 + b"2}\n\0\0\n")
    assert read_lines(path) == [{"a": 1}]
    append_line(path, {"a": 3})
    assert path.read_bytes() == b'{"a": 1}\n{"a": 3}\n'


def test_only_a_line_feed_ends_a_line_whoever_wrote_the_file(path: Path) -> None:
    path.write_bytes('{"a": "x\u2028y\u0085z",\r"b": 1}\r\n\r\n{"a": 2}\n'.encode())
    assert read_lines(path) == [{"a": "x\u2028y\u0085z", "b": 1}, {"a": 2}]


def test_a_link_is_not_appended_to(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "lines.jsonl").symlink_to(tmp_path / "notes")
    with pytest.raises(OSError, match="lines.jsonl"):
        append_line(tmp_path / "lines.jsonl", {"step": 1})
    assert (tmp_path / "notes").read_text() == "mine"
