"""Images at http(s) addresses: fetched once and kept by their content.

    cache = ImageCache(Path("fetched"), cfg.fetch)
    cache.prefetch(urls)   # many at once; what failed is remembered until the next call
    data = cache.get(url)  # from the folder

    fetched/urls/3f/3f9c...json  what an address gave: url, digest, bytes, content_type, fetched
    fetched/content/a0/a04b...   those bytes, named by their SHA-256

Any number of processes may share the folder: a file appears whole, under a name that follows from
its content or its address, and one that is damaged is fetched again, which is said. They share the
turns of each host as well, in `hosts` (hosts.py).
"""

import hashlib
import json
import re
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from phi3v.addresses import shown_url
from phi3v.config.dataset import FetchSection
from phi3v.errors import ConfigError, SampleError
from phi3v.prepare.web import Client
from phi3v.printing import print

HOSTS = "hosts"  # in the folder
DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """What an address gave, and when.

    Raises: ValueError if it cannot be that.
    """

    url: str
    digest: str
    bytes: int
    content_type: str
    fetched: str

    def __post_init__(self) -> None:
        if not isinstance(self.digest, str) or not DIGEST.fullmatch(self.digest):
            raise ValueError(f"digest is {self.digest!r}")
        if not isinstance(self.bytes, int) or self.bytes < 0:
            raise ValueError(f"bytes is {self.bytes!r}")


class ImageCache:
    """A folder of fetched images; `is_allowed` says of an address (10.0.0.7) if it may be used."""

    def __init__(
        self,
        folder: Path,
        settings: FetchSection,
        is_allowed: Callable[[str], bool] | None = None,
    ) -> None:
        self.folder, self.settings, self.is_allowed = folder, settings, is_allowed
        self.failed: dict[str, str] = {}
        self._has_said = False

    @cached_property
    def client(self) -> Client:
        """Made when the first image is fetched: 35 ms, most of it for the certificates."""
        return Client(self.settings, self.is_allowed, self.folder / HOSTS)

    def get(self, url: str) -> bytes:
        """Give the image at an address, from the folder if it is there.

        Raises: SampleError if it cannot be fetched, or could not in the last `prefetch`.
        """
        if url in self.failed:
            raise SampleError(self.failed[url])
        data = self._stored(url)
        return self._fetch(url) if data is None else data

    def prefetch(self, urls: Iterable[str]) -> None:
        """Bring images into the folder, `fetch.concurrency` at once, each address once."""
        self.failed = {}
        wanted = dict.fromkeys(urls)
        if not wanted:
            return
        assert self.client  # made here, before threads would each make one
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            for _ in pool.map(self._bring, wanted):
                pass  # raises what is no image's fault, such as a full disk

    def _bring(self, url: str) -> None:
        entry = self._entry(url)
        if entry is not None and self._is_there(entry):
            return  # `get` compares the digest
        try:
            self._fetch(url)
        except SampleError as error:
            self.failed[url] = str(error)

    def _stored(self, url: str) -> bytes | None:
        """The image of an address as it was fetched; None if it was not, or is damaged."""
        entry = self._entry(url)
        if entry is None or not self._is_there(entry):
            return None
        path = self._content(entry.digest)
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == entry.digest:
            return data
        self._say_damaged(path, "its bytes are not those of its name")
        return None

    def _entry(self, url: str) -> Entry | None:
        path = self._address(url)
        try:
            return Entry(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, RecursionError) as error:  # TypeError: other keys
            self._say_damaged(path, str(error))
            return None

    def _is_there(self, entry: Entry) -> bool:
        path = self._content(entry.digest)
        size = _size(path)
        if size not in (entry.bytes, -1):
            self._say_damaged(path, f"it has {size:,} bytes, not {entry.bytes:,}")
        return size == entry.bytes

    def _say_damaged(self, path: Path, fault: str) -> None:
        """Say it of the first: after a power failure there may be thousands."""
        if not self._has_said:
            self._has_said = True
            others = "it and others like it are fetched again"
            print(f"{path} is damaged ({fault}); {others}", file=sys.stderr)

    def _fetch(self, url: str) -> bytes:
        data, content_type = self.client.fetch(url)
        digest = hashlib.sha256(data).hexdigest()
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        entry = Entry(shown_url(url), digest, len(data), content_type, now)
        _write(self._content(digest), data)
        _write(self._address(url), json.dumps(asdict(entry), indent=1).encode())
        return data

    def _content(self, digest: str) -> Path:
        return self.folder / "content" / digest[:2] / digest

    def _address(self, url: str) -> Path:
        name = hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()
        return self.folder / "urls" / name[:2] / f"{name}.json"


@contextmanager
def local_images(
    places: Sequence[str], is_allowed: Callable[[str], bool] | None = None
) -> Iterator[list[Path]]:
    """Files of pictures, those at http(s) addresses fetched; what was fetched is removed after use.

    is_allowed  as of `ImageCache`

    Raises: ConfigError if one cannot be fetched.
    """
    with TemporaryDirectory(prefix="phi3v-") as folder:
        client: Client | None = None
        paths = []
        for number, place in enumerate(places):
            if not place.lower().startswith(("http://", "https://")):
                paths.append(Path(place))
                continue
            client = client or Client(FetchSection(), is_allowed)
            try:
                data, _ = client.fetch(place)
            except SampleError as error:
                reason = str(error).partition("; ")[0]  # what follows is advice for a recipe
                raise ConfigError(
                    f"--image: {reason}; name another, or download it and name the file"
                ) from error
            paths.append(Path(folder, str(number)))
            paths[-1].write_bytes(data)
        yield paths


def _size(path: Path) -> int:
    """Bytes of a file; -1 if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Unlike `phi3v.files`, for threads that write one file at a time, and without fsync: what a power
    failure damages is found by its digest and fetched again, and a flush for each of a million
    images would cost hours.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
