"""An image is fetched once, within bounds, and from the internet only; or a reason says why not."""

import errno
import hashlib
import ipaddress
import json
import multiprocessing
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpcore
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3v.addresses import shown_reference, shown_url
from phi3v.config.dataset import FetchSection, ImagesSection
from phi3v.errors import ConfigError, MachineError, SampleError
from phi3v.prepare import network, robots, web
from phi3v.prepare.fetch import ImageCache, local_images
from phi3v.prepare.images import ImageLoader
from phi3v.prepare.network import NAT64, is_public
from phi3v.prepare.robots import Robots
from phi3v.prepare.scan import reason_of
from phi3v.prepare.web import MAX_PAUSE
from tests.commands import ROOT
from tests.prepare.hosts import Host, jpeg

SLOW = 0.5  # seconds for a try of a host that is slow


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


def cache_of(folder: Path, retries: int = 0, **settings: object) -> ImageCache:
    """A cache that may fetch from this machine."""
    values = {"allow_private": True, "timeout": 10, "max_bytes": 1 << 20, **settings}
    return ImageCache(folder, FetchSection(retries=retries, **values))  # type: ignore[arg-type]


def refusal(cache: ImageCache, url: str) -> str:
    with pytest.raises(SampleError) as caught:
        cache.get(url)
    return str(caught.value)


def files(folder: Path, kind: str) -> list[Path]:
    return [path for path in (folder / kind).rglob("*") if path.is_file()]


def test_an_image_is_downloaded_once_whoever_asks_again(host: Host, tmp_path: Path) -> None:
    url = host.url("/good.jpg")
    for _ in range(2):
        assert cache_of(tmp_path).get(url) == host.image
        cache_of(tmp_path).prefetch([url, url])
    assert host.asked == {"/good.jpg": 1}


def test_the_folder_tells_what_an_address_gave(host: Host, tmp_path: Path) -> None:
    cache_of(tmp_path).get(host.url("/good.jpg"))
    (content,), (entry,) = files(tmp_path, "content"), files(tmp_path, "urls")
    digest = hashlib.sha256(host.image).hexdigest()
    assert (content.name, content.parent.name) == (digest, digest[:2])
    said = json.loads(entry.read_text())
    assert said.pop("fetched").endswith("+00:00")
    assert said == {
        "url": host.url("/good.jpg"),
        "digest": digest,
        "bytes": len(host.image),
        "content_type": "image/jpeg",
    }


def test_equal_images_of_several_addresses_are_stored_once(host: Host, tmp_path: Path) -> None:
    cache_of(tmp_path).prefetch([host.url("/good.jpg"), host.url("/good.jpg?again=1")])
    assert len(files(tmp_path, "urls")) == 2
    assert len(files(tmp_path, "content")) == 1


@pytest.mark.parametrize("damage", [b"", b"other bytes", None])
@pytest.mark.parametrize("kind", ["content", "urls"])
def test_a_damaged_file_of_the_folder_is_fetched_again(
    host: Host, tmp_path: Path, kind: str, damage: bytes | None
) -> None:
    cache_of(tmp_path).get(host.url("/good.jpg"))
    (path,) = files(tmp_path, kind)
    path.write_bytes(damage if damage is not None else path.read_bytes()[:-1] + b"!")
    assert cache_of(tmp_path).get(host.url("/good.jpg")) == host.image
    assert cache_of(tmp_path).get(host.url("/good.jpg")) == host.image
    assert host.asked["/good.jpg"] == 2


@pytest.mark.parametrize(
    "entry",
    [
        '{"url": 1, "digest": 7, "bytes": 3, "content_type": "", "fetched": ""}',
        '{"url": "", "digest": "../../x", "bytes": 3, "content_type": "", "fetched": ""}',
        '{"url": "", "digest": "' + 64 * "a" + '", "bytes": "3", "content_type": "", "fetched": 1}',
        '{"url": ""}',
        "[[[",
        "null",
        "7",
        "[" * 100_000,
        "\udcff",
    ],
    ids=range(9),
)
def test_an_entry_of_other_types_is_as_none_and_is_said_once(
    host: Host, tmp_path: Path, entry: str, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = [host.url("/good.jpg"), host.url("/numbered/1")]
    cache_of(tmp_path).prefetch(urls)
    for path in files(tmp_path, "urls"):
        path.write_bytes(entry.encode(errors="surrogateescape"))
    cache = cache_of(tmp_path)
    cache.prefetch(urls)
    assert [cache.get(url) for url in urls] == [host.image, jpeg(seed=1)]
    assert set(host.asked.values()) == {2}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}/urls/") and " is damaged (" in line
    assert line.endswith("; it and others like it are fetched again")


def test_prefetch_fetches_many_at_once_and_no_more_than_it_may(host: Host, tmp_path: Path) -> None:
    urls = [host.url(f"/slow/{number}") for number in range(12)]
    cache = cache_of(tmp_path, concurrency=4)
    cache.prefetch(urls)
    assert 2 <= host.at_once <= 4
    assert [cache.get(url) for url in urls] == [jpeg(seed=number) for number in range(12)]
    assert set(host.asked.values()) == {1}


def test_a_failure_is_remembered_until_the_next_prefetch(host: Host, tmp_path: Path) -> None:
    cache, url = cache_of(tmp_path), host.url("/missing.jpg")
    cache.prefetch([url, host.url("/good.jpg"), host.url("/busy.jpg"), url])
    assert refusal(cache, url) == refusal(cache, url)
    assert cache.get(host.url("/good.jpg")) == host.image
    assert host.asked["/missing.jpg"] == 1
    assert "429" in refusal(cache, host.url("/busy.jpg"))
    cache.prefetch([url])
    assert host.asked["/missing.jpg"] == 2
    assert cache.get(host.url("/busy.jpg")) == host.image


def test_a_full_disk_is_nobodys_bad_image(host: Host, tmp_path: Path) -> None:
    (tmp_path / "content").write_text("a file where a folder should be")
    with pytest.raises(OSError):
        cache_of(tmp_path).prefetch([host.url("/good.jpg")])


def _fill(folder: Path, urls: list[str]) -> None:
    cache_of(folder, per_host=32).prefetch(urls)


def test_processes_share_a_folder(host: Host, tmp_path: Path) -> None:
    urls = [host.url(f"/together/{number}") for number in range(16)]
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_fill, args=(tmp_path, urls)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert set(host.asked.values()) == {2}  # at the same time
    assert [cache_of(tmp_path).get(url) for url in urls] == [jpeg(seed=n) for n in range(16)]
    assert set(host.asked.values()) == {2}
    assert not list(tmp_path.rglob("*.tmp"))


# What a host does, and the reason that follows, tried once.
BAD_HOSTS = [
    ("/missing.jpg", "image URL answered with an error: 404, {}"),
    ("/forbidden.jpg", "image URL answered with an error: 403, {}"),
    ("/failing.jpg", "image URL answered with an error: 503, {}; tries: 1"),
    ("/drip.jpg", "image URL took too long: {}, more than 0.5 s; tries: 1"),
    ("/headers_drip.jpg", "image URL took too long: {}, more than 0.5 s; tries: 1"),
    ("/hang.jpg", "image URL took too long: {}, more than 0.5 s; tries: 1"),
    ("/endless.jpg", "image URL gave too many bytes: {}, fetch.max_bytes is 1,048,576"),
    ("/boast.jpg", "image URL gave too many bytes: {}, fetch.max_bytes is 1,048,576"),
    ("/short.jpg", "image URL gave no whole answer: {}, peer closed connection without"),
    ("/reset.jpg", "image URL gave no whole answer: {}, "),
    ("/garbage.jpg", "image URL gave no whole answer: {}, illegal status line"),
    (
        "/page.jpg",
        "image URL gave no image: {}, 27 bytes of image/jpeg, which are a web page",
    ),
    ("/plain.jpg", "image URL gave no image: {}, 27 bytes of text/html, which are a web page"),
    ("/empty.jpg", "image URL gave no image: {}, 0 bytes of image/jpeg"),
    ("/loop", "image URL redirects too often: {}, in a circle of 2"),
    ("/chain/6", "image URL redirects too often: {}, more than 5 times"),
    ("/away", "image URL is not valid: {}, it is no http(s) address of a host"),
    ("/nowhere", "image URL is not valid: {}, it leads to an address that cannot be read"),
]


@pytest.mark.parametrize(("path", "reason"), BAD_HOSTS, ids=[path for path, _ in BAD_HOSTS])
def test_a_bad_host_gives_a_reason_in_time_and_leaves_no_file(
    host: Host, tmp_path: Path, path: str, reason: str
) -> None:
    start = time.monotonic()
    timeout = SLOW if "too long" in reason else 10
    said = refusal(cache_of(tmp_path, timeout=timeout), host.url(path))
    assert said.startswith(reason.format(host.url(path)))
    assert "smtp" not in said and "Please" not in said  # nothing of what it answers is quoted
    assert time.monotonic() - start < 10  # the slow ones would take half a minute
    assert not files(tmp_path, "content") and not files(tmp_path, "urls")


def test_redirects_are_followed_up_to_five(host: Host, tmp_path: Path) -> None:
    for path in ("/moved.jpg", "/chain/5"):
        assert cache_of(tmp_path).get(host.url(path)) == host.image


def test_a_length_that_says_too_little_ends_the_image_there(host: Host, tmp_path: Path) -> None:
    assert cache_of(tmp_path).get(host.url("/modest.jpg")) == host.image[:100]


@pytest.mark.slow
def test_what_may_get_better_is_tried_again(host: Host, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, retries=2)
    assert cache.get(host.url("/shaky.jpg")) == host.image
    assert cache.get(host.url("/busy.jpg")) == host.image
    assert host.asked == {"/shaky.jpg": 3, "/busy.jpg": 2}


def test_tries_are_bounded_and_counted(host: Host, tmp_path: Path) -> None:
    said = refusal(cache_of(tmp_path, retries=1), host.url("/short.jpg"))
    assert said.endswith("; tries: 2")
    assert host.asked["/short.jpg"] == 2


def test_what_cannot_get_better_is_tried_once(host: Host, tmp_path: Path) -> None:
    for path in ("/missing.jpg", "/page.jpg", "/endless.jpg", "/away"):
        refusal(cache_of(tmp_path, retries=3), host.url(path))
        assert host.asked[path] == 1, path


@pytest.mark.slow
def test_the_host_says_how_long_to_wait(host: Host, tmp_path: Path) -> None:
    start = time.monotonic()
    cache_of(tmp_path, retries=1).get(host.url("/patient.jpg"))
    assert 1 <= time.monotonic() - start < MAX_PAUSE


def test_a_port_where_nobody_listens_cannot_be_reached(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and no listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/a.jpg"
        said = refusal(cache_of(tmp_path), url)
    assert said == f"image URL cannot be reached: {url}, [Errno 111] Connection refused; tries: 1"


def test_an_address_of_this_machine_is_refused_before_anything_is_sent(
    host: Host, tmp_path: Path
) -> None:
    cache = cache_of(tmp_path, allow_private=False)
    for name in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "0.0.0.0"):
        url = host.url("/good.jpg", name)
        said = refusal(cache, url)
        assert said.startswith(f"image URL leads to a private address: {url}, "), said
        assert said.endswith("; to fetch from it, set fetch.allow_private")
    assert not host.asked


def test_a_redirect_to_an_address_that_is_not_allowed_is_refused(
    host: Host, tmp_path: Path
) -> None:
    settings = FetchSection(timeout=10, retries=0)
    cache = ImageCache(tmp_path, settings, is_allowed=lambda address: address == "127.0.0.1")
    assert cache.get(host.url("/good.jpg")) == host.image
    said = refusal(cache, host.url("/inward"))
    assert said.startswith(
        f"image URL leads to a private address: {host.url('/inward')}, 127.0.0.2; to fetch"
    )


def test_of_a_name_with_several_addresses_only_allowed_ones_are_connected_to(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux answers on all of 127.0.0.0/8: whoever asked 127.0.0.2 would get the picture there."""
    asked = []

    def is_allowed(address: str) -> bool:
        return address == "127.0.0.1"

    def connect(self: Any, address: str, port: int, timeout: float) -> Any:
        asked.append(address)
        return real(self, address, port, timeout)

    real = httpcore.SyncBackend.connect_tcp
    monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", connect)
    monkeypatch.setattr(network, "_look_up", lambda *_: ["127.0.0.2", "127.0.0.3", "127.0.0.1"])
    cache = ImageCache(tmp_path, FetchSection(timeout=10, retries=0), is_allowed=is_allowed)
    assert cache.get(host.url("/good.jpg")) == host.image
    assert asked == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.216.34", True),
        ("2606:4700::1111", True),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::5db8:d822", True),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("127.9.9.9", False),
        ("169.254.169.254", False),  # where clouds tell their machines' credentials
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("::ffff:169.254.169.254", False),
        ("::7f00:1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("192.0.0.192", False),  # Oracle's metadata
        ("192.0.0.8", False),
        ("192.0.0.9", False),
        ("168.63.129.16", False),  # Azure's
        ("168.63.129.17", True),
        ("100.100.100.200", False),  # Alibaba's
        ("198.18.0.1", False),
        ("198.19.255.255", False),
        ("198.20.0.1", True),
        ("192.88.99.1", False),
        ("2001:0:a00:7::", False),  # Teredo
        ("2001:1::1", False),
        ("2001:20::1", False),
        ("2001:db8::1", False),
        ("2001:200::1", True),
        ("2002:a83f:8110::", False),  # Azure's by 6to4
        ("3fff::1", False),
        ("5f00::1", False),
        ("64:ff9b:1::5db8:d822", False),
        ("100::1", False),
        ("fd00:ec2::254", False),  # Amazon's
        ("::ffff:0:a00:7", False),
        ("::ffff:168.63.129.16", False),
    ],
)
def test_only_addresses_of_the_internet_are_public(address: str, expected: bool) -> None:
    assert is_public(address) is expected


@settings(max_examples=500, deadline=None)
@given(st.ip_addresses())
def test_what_is_public_is_no_less_than_what_this_python_says_of_it(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None) or address
    if is_public(str(address)) and inner not in NAT64:
        assert inner.is_global and not inner.is_multicast


def test_proxies_of_the_environment_are_not_used(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert cache_of(tmp_path).get(host.url("/good.jpg")) == host.image


def test_credentials_are_sent_to_their_host_and_written_nowhere(host: Host, tmp_path: Path) -> None:
    url = host.url("/missing.jpg?signature=s3cret", "me:pa%40ss@127.0.0.1")
    said = refusal(cache_of(tmp_path), url)
    assert said.endswith(f"404, {host.url('/missing.jpg')}?...")
    assert host.headers[0]["Authorization"] == "Basic bWU6cGFAc3M="  # me:pa@ss
    cache_of(tmp_path).get(url.replace("missing", "good"))
    (entry,) = files(tmp_path, "urls")
    assert "pa%40ss" not in entry.read_text() and "s3cret" not in entry.read_text()


def test_an_address_is_shown_without_what_may_be_secret() -> None:
    assert shown_url("https://me:p:w@x.org/a/b.jpg?k=1#f") == "https://x.org/a/b.jpg?..."
    assert shown_url("http://x.org/icon@2x.png?a@b#@") == "http://x.org/icon@2x.png?..."
    assert shown_reference("pictures/icon@2x.png") == "pictures/icon@2x.png"
    assert shown_reference("C:\\pictures\\icon@2x.png") == "C:\\pictures\\icon@2x.png"


MANGLED = [
    "http://me:PW@ho\u2100st/",
    "http://me:s3/PW@host/",
    "http://me:PW/s3@host.org/",
    "http://me:12345/PW@host/a.jpg",
    "http://me:P?PW@host/",
    "http://me:P#PW@host/",
    "http://me:PW\\s@host/",
    "http://me:p@s.s/PW@host/",
    "http://me:PW",
    "http://me:PW@[1/",
    "http://me:PW@host:port/",
    "http://me:PW@/",
    "http://me:PW@",
    "http://me:P W@a b/".replace("P W", "PW PW"),
    "http://me:PW@x\ud83d/",
    "http://me:PW\ud83d@127.0.0.1:9/",
    "http://PW\n@[::1/",
    "HTTP://me:PW@127.0.0.1:9/",
    "http:/me:PW@host/",
    "http:me:PW@host/",
    " http://me:PW@host/a.jpg",
    "h\tttp://me:PW@host/a.jpg",
    "//me:PW@host/a.jpg",
    "me:PW@host/a.jpg",
    "ftp://me:PW@host/a.jpg",
    "s3://me:PW@bucket/a.jpg",
    "http://h.org/a.jpg?token=PW",
    "http://127.0.0.1:9/a.jpg?X-Amz-Signature=PW&sig=PW#PW",
]


@pytest.mark.parametrize("url", MANGLED)
def test_no_reason_holds_the_password_of_an_address_however_it_is_written(
    tmp_path: Path, url: str
) -> None:
    loader = ImageLoader(tmp_path, 100, cache_of(tmp_path), ImagesSection())
    with pytest.raises(SampleError) as caught:
        loader.picture(url)
    assert "PW" not in reason_of(caught.value)


@settings(max_examples=300, deadline=None)
@given(st.text("PQ:/@?#[]\\.a0\u2100 %", max_size=12), st.sampled_from(["http://", "http:", ""]))
def test_what_stands_before_the_last_at_of_an_address_is_shown_of_a_plain_host_alone(
    text: str, scheme: str
) -> None:
    shown = shown_reference(f"{scheme}me:{text}PW@host/a.jpg")
    assert "PW" not in shown
    if scheme:  # else `me:` is one, and what follows may be a plain host: me:0.0?PW@host/a.jpg
        assert shown.endswith("host/a.jpg")


def test_a_password_in_any_other_reason_is_cut_out() -> None:
    said = reason_of(SampleError("key 'page' is not known: 'http://me:PW/s@x.org/a', in row 3"))
    assert said == "key 'page' is not known: 'http://x.org/a', in row 3"


def test_an_address_may_hold_spaces_and_letters_of_any_script(host: Host, tmp_path: Path) -> None:
    url = host.url("/good.jpg/caf\u00e9 1%20.jpg?size=gro\u00df&x=[1]")
    assert cache_of(tmp_path).get(url) == host.image
    assert list(host.asked) == ["/good.jpg/caf%C3%A9%201%20.jpg?size=gro%C3%9F&x=[1]"]
    assert host.headers[0]["Host"] == host.url("").removeprefix("http://")


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///a.jpg",
        "http://x:1000000/",
        "http://a..b/",
        "http://x/\ud83d",
        "http://[1",
    ],
)
def test_what_is_no_address_says_so(tmp_path: Path, url: str) -> None:
    assert refusal(cache_of(tmp_path), url).startswith(f"image URL is not valid: {url}, ")


def test_a_name_that_nobody_has_is_looked_up_once(tmp_path: Path) -> None:
    said = refusal(cache_of(tmp_path, retries=3), "http://-x-/a.jpg")
    assert said == "image URL cannot be reached: http://-x-/a.jpg, no host has this name"


def test_a_connection_serves_several_images(host: Host, tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    for number in range(5):
        cache.get(host.url(f"/numbered/{number}"))
    assert len(host.connections) == 1


def test_every_reason_of_this_file_is_in_the_docs() -> None:
    table = (ROOT / "docs/data.md").read_text(encoding="utf-8").partition("## What is rejected")[2]
    text = Path(__file__).read_text(encoding="utf-8")
    text += Path(__file__).with_name("test_hosts.py").read_text(encoding="utf-8")
    reasons = set(re.findall(r"image URL [a-z ]+(?=:)", text))
    assert len(reasons) == 11
    for reason in reasons:
        assert f"| {reason} |" in table


# --- --image of launch/generate.py ---


def test_pictures_of_the_command_line_are_files_or_fetched(host: Host, tmp_path: Path) -> None:
    url = host.url("/good.jpg")
    with local_images([str(tmp_path / "a.png"), url, url], lambda _: True) as paths:
        assert paths[0] == tmp_path / "a.png"
        assert [path.read_bytes() for path in paths[1:]] == [host.image] * 2
    assert not paths[1].exists()


@pytest.mark.parametrize(
    ("path", "is_allowed", "reason"),
    [
        ("/none.jpg", True, "image URL answered with an error: 404"),
        ("/good.jpg", False, "image URL leads to a private address: "),
    ],
)
def test_a_picture_of_the_command_line_that_cannot_be_fetched_is_refused(
    host: Host, path: str, is_allowed: bool, reason: str
) -> None:
    with (
        pytest.raises(ConfigError, match=f"^--image: {reason}") as caught,
        local_images([host.url(path)], lambda _: is_allowed),
    ):
        pass
    assert str(caught.value).endswith("; name another, or download it and name the file")
    assert "allow_private" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOBUFS])
def test_a_want_of_this_machine_is_not_the_addresses_fault(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    cache = cache_of(tmp_path)
    monkeypatch.setattr(socket, "create_connection", failing)
    for ask in (cache.get, lambda url: cache.prefetch([url])):
        with pytest.raises(MachineError, match="image at http://.*/good.jpg cannot be read"):
            ask(host.url("/good.jpg"))


@pytest.mark.parametrize(
    "said",
    [
        "Mon, 01 Jan 99999999999999999999 00:00:00 GMT",
        "Wed, 21 Oct 2026 07:28:00 +999999999999999999",
        "Wed, 21 Oct 2026 99999999999999999999:28:00 GMT",
        "soon",
        "1e9",
    ],
)
def test_a_time_to_wait_that_is_none_is_passed_over(said: str) -> None:
    assert web._retry_after(httpcore.Response(429, headers=[("Retry-After", said)])) is None


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("image/PNG; x=y", "image/png"),
        ("AKIA5SECRET", "a content type that is not known"),
        ("secret/token", "a content type that is not known"),
        ("", "no content type"),
    ],
)
def test_no_byte_of_a_content_type_is_told_that_is_not_one_of_those_known(
    said: str, told: str
) -> None:
    response = httpcore.Response(200, headers=[("Content-Type", said)])
    assert web._content_type(response) == told


@pytest.mark.parametrize(
    "line", ["Crawl-delay: \u00b2", "Request-rate: 1/\u00b2", "Disallow: http://[::1", "x: //["]
)
def test_a_line_of_robots_txt_that_cannot_be_read_is_passed_over(line: str) -> None:
    text = f"User-agent: *\n{line}\nDisallow: /closed\n"
    rules = Robots(lambda _: (200, text.encode()))
    assert rules.allow("http://example.org/a") and not rules.allow("http://example.org/closed/a")


def test_rules_of_few_origins_are_held_and_who_comes_back_asks_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    rules = Robots(lambda address: asked.append(address) or (200, b"User-agent: *\nDisallow: /x"))
    monkeypatch.setattr(robots, "MOST_ORIGINS", 2)
    for host in "abacab":
        assert rules.allow(f"http://{host}/a") and not rules.allow(f"http://{host}/x")
    assert [address[7] for address in asked] == ["a", "b", "c", "b"]
    assert len(rules._rules) == len(rules._asked) == len(rules._asking) == 2
    monkeypatch.setattr(robots, "MOST_RULES", 3)
    assert rules.allow("http://d/a") and rules.allow("http://d/b")
    assert set(rules._rules) == {"http://d"}
