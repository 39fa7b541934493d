"""Whether a model folder is the one that a run started from, wherever it lies now."""

import hashlib
from pathlib import Path

from transformers.utils.hub import cached_file

from phi3v.reading import is_of_machine, machine_error

SETTINGS = ("config.json", "preprocessor_config.json", "tokenizer.json")
BLOCKS, BLOCK_BYTES = 256, 1 << 14


def model_digest(model: str) -> str | None:
    """A SHA-256 that tells a model folder or hub model from others; None where there is none.

    It is of the settings and the tokenizer, and of each file of weights its size and 256 blocks of
    16 kB, evenly spaced: 4 MB a file instead of 5 GB. Training moves every weight that it trains,
    so that a fine-tune of the same base differs in nearly all blocks.
    """
    try:
        config = cached_file(model, "config.json", _raise_exceptions_for_missing_entries=False)
    except OSError as error:  # no folder here, and no such name on the hub
        if is_of_machine(error):
            raise machine_error(error, f"config.json of model {model}") from error
        return None
    if config is None:
        return None
    folder = Path(config).parent
    files = [folder / name for name in SETTINGS if (folder / name).is_file()]
    digest = hashlib.sha256()
    for file in [*files, *sorted(folder.glob("*.safetensors"))]:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as handle:
            for place in _places(size):
                handle.seek(place)
                digest.update(handle.read(BLOCK_BYTES))
    return digest.hexdigest()


def _places(size: int) -> list[int]:
    """Where the blocks of a file begin: all of a small file, else the first, the last, and between.

    40000 -> [0, 16384, 32768]
    """
    if size <= BLOCKS * BLOCK_BYTES:
        return list(range(0, size, BLOCK_BYTES))
    return [(size - BLOCK_BYTES) * number // (BLOCKS - 1) for number in range(BLOCKS)]
