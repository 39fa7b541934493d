"""Hosts are asked politely: few at once, not while they rest, by their rules, under a name."""

import errno
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phi3v.config.dataset import FetchSection
from phi3v.errors import ConfigError, SampleError
from phi3v.prepare import hosts as hosts_module
from phi3v.prepare.fetch import ImageCache
from phi3v.prepare.hosts import MOST_REST, Hosts
from tests.prepare.hosts import Host

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


def cache_of(folder: Path, retries: int = 0, **settings: object) -> ImageCache:
    values = {"allow_private": True, "timeout": 10, **settings}
    return ImageCache(folder, FetchSection(retries=retries, **values))  # type: ignore[arg-type]


def refusal(cache: ImageCache, url: str) -> str:
    with pytest.raises(SampleError) as caught:
        cache.get(url)
    return str(caught.value)


def _fill(folder: Path, urls: list[str]) -> None:
    cache_of(folder, concurrency=8, per_host=3).prefetch(urls)


def test_a_host_is_asked_by_few_at_once_over_all_processes(host: Host, tmp_path: Path) -> None:
    shares = [[host.url(f"/slow/{3 * n + share}") for n in range(6)] for share in range(3)]
    processes = [FORK.Process(target=_fill, args=(tmp_path, urls)) for urls in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(host.asked) == 18 and set(host.asked.values()) == {1}
    assert 2 <= host.at_once <= 3


def _hold(folder: Path, held: object) -> None:
    with Hosts(folder, 1).turn("example.org"):
        held.set()  # type: ignore[attr-defined]
        time.sleep(60)


def test_the_turn_of_a_killed_process_is_free_again(tmp_path: Path) -> None:
    held = FORK.Event()
    process = FORK.Process(target=_hold, args=(tmp_path, held))
    process.start()
    assert held.wait(10)
    process.kill()
    process.join()
    with Hosts(tmp_path, 1).turn("example.org"):
        pass


def test_where_a_file_system_has_no_locks_each_process_asks_once_at_a_time(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(hosts_module.fcntl, "flock", no_locks)
    cache_of(tmp_path, concurrency=4).prefetch([host.url(f"/slow/{n}") for n in range(4)])
    assert host.at_once == 1 and len(host.asked) == 4


def test_a_turn_does_not_follow_a_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    hosts = Hosts(tmp_path / "hosts", 1)
    with hosts.turn("example.org"):
        pass
    (turn,) = (tmp_path / "hosts").rglob("0")
    turn.unlink()
    turn.symlink_to(precious)
    with pytest.raises(OSError), hosts.turn("example.org"):
        pass
    assert precious.read_text() == "mine"


def test_the_time_of_waiting_for_a_turn_is_not_of_the_try(host: Host, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, concurrency=4, per_host=1, timeout=0.3)
    cache.prefetch([host.url(f"/slow/{n}") for n in range(6)])  # 0.1 s each, 0.6 s the last one
    assert not cache.failed


def test_a_host_that_asks_for_rest_is_left_alone_by_all(host: Host, tmp_path: Path) -> None:
    first, start = cache_of(tmp_path), time.monotonic()
    assert "429" in refusal(first, host.url("/patient.jpg"))  # Retry-After: 1
    other = cache_of(tmp_path)  # as in another process
    assert other.get(host.url("/good.jpg")) == host.image
    assert 0.9 <= time.monotonic() - start < 10


def test_a_rest_longer_than_an_image_may_wait_is_said_at_once_and_kept(
    host: Host, tmp_path: Path
) -> None:
    assert "429" in refusal(cache_of(tmp_path), host.url("/tired.jpg"))
    start = time.monotonic()
    said = refusal(cache_of(tmp_path, retries=3, wait=5), host.url("/good.jpg"))
    assert said.startswith(f"image URL must wait too long: {host.url('/good.jpg')}, its host asks ")
    assert said.endswith("s, fetch.wait leaves 5 s")
    assert time.monotonic() - start < 5
    assert "/good.jpg" not in host.asked


def test_tries_end_with_what_an_image_may_wait(host: Host, tmp_path: Path) -> None:
    said = refusal(cache_of(tmp_path, retries=9, wait=0.1), host.url("/failing.jpg"))
    assert said.endswith("; tries: 1, and fetch.wait is over")
    assert host.asked["/failing.jpg"] == 1


def test_a_rest_is_for_its_host_alone_and_at_most_an_hour(tmp_path: Path) -> None:
    hosts, other = Hosts(tmp_path, 1), Hosts(tmp_path, 1)
    hosts.rest("a.org", 1e12)
    hosts.rest("a.org", 1)  # does not end it sooner
    assert MOST_REST - 60 < other.seconds_left("a.org") <= MOST_REST
    assert other.seconds_left("b.org") == 0
    (note,) = tmp_path.glob("*/*/rest")
    os.utime(note, (2**33, 2**33))  # by whoever can write there, or a clock that is wrong
    assert other.seconds_left("a.org") <= MOST_REST


def test_requests_say_who_is_to_be_reached(host: Host, tmp_path: Path) -> None:
    cache_of(tmp_path / "a", contact="data@example.org").get(host.url("/good.jpg"))
    cache_of(tmp_path / "b").get(host.url("/good.jpg"))
    agents = [headers["User-Agent"] for headers in host.headers]
    assert agents == [
        "phi3v dataset preparation (data@example.org)",
        "phi3v dataset preparation",
    ]


@pytest.mark.parametrize("contact", ["a\r\nX: 1", "caf\u00e9", "\x1b"])
def test_a_contact_that_is_no_part_of_a_header_is_refused(contact: str) -> None:
    with pytest.raises(ConfigError, match="^fetch.contact is sent in a header and must be print"):
        FetchSection(contact=contact)


RULES = b"User-agent: phi3v\nDisallow: /private\n\nUser-agent: *\nDisallow: /\n"


def test_robots_txt_is_obeyed_where_the_recipe_says_so(host: Host, tmp_path: Path) -> None:
    host.robots = (200, RULES)
    cache = cache_of(tmp_path, robots="obey")
    assert cache.get(host.url("/good.jpg")) == host.image
    url = host.url("/private/a.jpg")
    assert refusal(cache, url) == (
        f"image URL is closed to programs: {url}, by its host's robots.txt; fetch.robots says "
        "whether that counts"
    )
    assert host.asked == {"/robots.txt": 1, "/good.jpg": 1}
    ignoring = cache_of(tmp_path)
    assert "404" in refusal(ignoring, url)
    assert host.asked["/robots.txt"] == 1


def test_a_redirect_is_held_to_robots_txt_too(host: Host, tmp_path: Path) -> None:
    host.robots = (200, b"User-agent: *\nDisallow: /good\n")
    said = refusal(cache_of(tmp_path, robots="obey"), host.url("/robotic"))
    assert said.startswith("image URL is closed to programs: ")


def test_a_host_without_robots_txt_closes_nothing(host: Host, tmp_path: Path) -> None:
    assert cache_of(tmp_path, robots="obey").get(host.url("/good.jpg")) == host.image


def test_a_host_whose_robots_txt_fails_is_asked_for_no_image(host: Host, tmp_path: Path) -> None:
    host.robots = (503, b"")
    said = refusal(cache_of(tmp_path, robots="obey"), host.url("/good.jpg"))
    address = host.url("/robots.txt")
    assert said == f"image URL answered with an error: 503, {address}; tries: 1"
    assert list(host.asked) == ["/robots.txt"]


def test_a_robots_txt_without_an_end_is_read_as_far_as_it_must(host: Host, tmp_path: Path) -> None:
    host.robots = (200, b"User-agent: *\nDisallow: /good\n" + b"# more\n" * 200_000)
    said = refusal(cache_of(tmp_path, robots="obey"), host.url("/good.jpg"))
    assert said.startswith("image URL is closed to programs: ")


def test_many_ask_for_one_robots_txt_once(host: Host, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, robots="obey", concurrency=8)
    cache.prefetch([host.url(f"/numbered/{number}") for number in range(16)])
    assert not cache.failed and host.asked["/robots.txt"] == 1
