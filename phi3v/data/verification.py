"""Whether the files of a dataset folder are what its manifest says: by size, or to the last bit.

    check_files(listed_files(Path("shards/docvqa")))      # reads every byte, in threads

Who reads records and not files compares each with its digest in the index (`Dataset`, "sampled").
"""

import stat
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3v.data.format import PREPARE_AGAIN, advice, check_seal, read_manifest
from phi3v.errors import ShardError
from phi3v.files import sha256

READERS = 4  # threads


@dataclass(frozen=True)
class ListedFile:
    """A file as a manifest lists it: where it lies, its size in bytes, its SHA-256."""

    path: Path
    bytes: int
    sha256: str

    @classmethod
    def of(cls, folder: Path, entry: Mapping[str, Any]) -> "ListedFile":
        """From a manifest's entry of a shard or an index."""
        return cls(folder / entry["file"], entry["bytes"], entry["sha256"])

    def check_size(self) -> None:
        """Raises: ShardError if the file is missing or has another size."""
        try:
            found = self.path.stat()
        except FileNotFoundError as error:
            raise ShardError(
                f"{self.path} is missing though the manifest lists it; {PREPARE_AGAIN}"
            ) from error
        except OSError as error:
            raise ShardError(f"{self.path} cannot be read ({error}); {advice(error)}") from error
        if not stat.S_ISREG(found.st_mode):
            raise ShardError(f"{self.path} is not a plain file; {PREPARE_AGAIN}")
        if (size := found.st_size) != self.bytes:
            raise ShardError(
                f"{self.path} has {size:,} bytes, the manifest says {self.bytes:,}; {PREPARE_AGAIN}"
            )

    def check_digest(self, told: Callable[[int], object] = lambda size: None) -> None:
        """Read the whole file; `told` hears of each block's bytes.

        Raises: ShardError if it cannot be read or is not what it should be.
        """
        self.check_size()
        try:
            found = sha256(self.path, told)
        except OSError as error:
            raise ShardError(f"{self.path} cannot be read ({error}); {advice(error)}") from error
        if found != self.sha256:
            raise ShardError(
                f"{self.path} has SHA-256 {found[:12]}..., the manifest says "
                f"{self.sha256[:12]}..., so the file is damaged or another dataset's; "
                f"bring it back from a copy, or {PREPARE_AGAIN}"
            )


def listed_files(folder: Path) -> list[ListedFile]:
    """Every file of every split of a dataset folder.

    Raises: ShardError if the folder is no dataset, or its manifest is not what was written.
    """
    manifest = read_manifest(folder)
    check_seal(folder, manifest)
    return [
        ListedFile.of(folder, entry)
        for split in manifest["splits"].values()
        for entry in (split["index"], *split["shards"])
    ]


def check_files(
    files: Iterable[ListedFile], told: Callable[[int], object] = lambda size: None
) -> None:
    """Compare files with their digests; `told` hears of the bytes as they are read.

    Raises: ShardError naming the first that is not what it should be.
    """
    lock = threading.Lock()

    def tell(size: int) -> None:
        with lock:
            told(size)

    threads = ThreadPoolExecutor(READERS, "verification")
    try:
        for _ in threads.map(lambda file: file.check_digest(tell), files):
            pass
    finally:
        threads.shutdown(cancel_futures=True)
