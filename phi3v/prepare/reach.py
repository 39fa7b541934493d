"""Which files a source may name, in its rows or of itself: those in folders that the recipe names.

Rows are somebody's text, the recipe is the user's own. So a folder is trusted because the recipe
names it, wherever it really is; and a file because it lies in such a folder once all links are
followed. What `datasets` downloads or unpacks for a source lies in its cache, and counts as well.

A folder of data may say which of its files are read, in the YAML of its README.md, say, and by
links. Neither may lead out of it: `datasets` would follow them anywhere, and to any host.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import datasets
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from phi3v.config import read_yaml
from phi3v.config.dataset import SourceSection
from phi3v.errors import ConfigError
from phi3v.places import local_path
from phi3v.reading import FOLDER, HIDDEN, PLAIN, Reach, kind_at
from phi3v.stored import read_object

CARDS = ("README.md", ".huggingface.yaml")  # whose `configs` say what is read of a folder
LISTS = {"dataset_dict.json": "splits", "state.json": "_data_files"}  # of what `datasets` saved
OTHERS = ("dataset_infos.json", "dataset_info.json")  # that `datasets` reads as a whole
MOST_BYTES = 1 << 24  # per file
PICTURES = frozenset(ImageFolder.EXTENSIONS)  # which no one but `ImageLoader` opens


def image_root(section: SourceSection) -> Path:
    """Where relative image paths of a source start."""
    if section.image_root:
        return local_path(section.image_root)
    path = local_path(section.paths[0])
    return path.parent if path.exists() else Path()


def check_named(section: SourceSection) -> None:
    """Refuse folders of pictures that the recipe names and that are none.

    Raises: ConfigError naming the first.
    """
    named = [("image_root", section.image_root)] if section.image_root else []
    named += [("image_folders", folder) for folder in section.image_folders or ()]
    for key, folder in named:
        if (kind := kind_at(local_path(folder))) not in (FOLDER, HIDDEN):
            what = f"is {kind}, not a folder" if kind else "does not exist"
            raise ConfigError(f"source.{key} {folder} {what}; name the folder of the pictures")


def reach(section: SourceSection) -> Reach:
    """Where the images of a source may lie."""
    further = [local_path(folder) for folder in section.image_folders or ()]
    path = local_path(section.paths[0])
    if path.exists() and not path.is_dir():
        return Reach.of(image_root(section), *further)
    named = [local_path(section.image_root)] if section.image_root else []
    return Reach.of(*named, *further, *_kept(section.paths[0]))


def _kept(path: str) -> list[Path]:
    """Where the files of a folder or hub dataset are: itself, and what is unpacked of it."""
    unpacked = Path(datasets.config.DOWNLOADED_DATASETS_PATH)
    folder = local_path(path)
    if folder.exists():
        return [folder, unpacked]
    return [Path(HF_HUB_CACHE, repo_folder_name(repo_id=path, repo_type="dataset")), unpacked]


def check_folder(section: SourceSection, folder: Path) -> None:
    """Refuse a folder of data that names what lies outside of it.

    Raises: ConfigError naming the file that does; what reading its YAML or JSON raises.
    """
    path, allowed = section.paths[0], reach(section)
    for file, texts in _named(folder):
        if outside := next((text for text in texts if _leads_out(text)), None):
            raise ConfigError(
                f"source.path {path}: {file} names {outside!r}, which is not in the folder; take "
                "it out, or name that file in source.path yourself"
            )
    for link in _links(folder):
        real = os.path.realpath(link)
        if not allowed.holds(real) and not (_is_picture(link) and os.path.isfile(real)):
            raise ConfigError(
                f"source.path {path}: {os.path.relpath(link, folder)} leads out of the folder, to "
                f"{real}; remove it, or name the folder it leads to in source.image_folders"
            )


def check_files(section: SourceSection, files: Iterable[str], base: str | None) -> None:
    """Refuse files that `datasets` would read from elsewhere than the folder or hub dataset.

    base  the address of a hub dataset's files; None: they are in a folder

    Raises: ConfigError naming the first.
    """
    allowed = reach(section)
    for file in files:
        if base is not None:
            is_own = file.startswith(base)
        else:
            is_own = _is_picture(file) or allowed.holds(os.path.realpath(file))
        if not is_own:
            raise ConfigError(
                f"source.path {section.paths[0]} has {file} read, which is not its own; name that "
                "file in source.path yourself"
            )


def _is_picture(file: str) -> bool:
    return "://" not in file and os.path.splitext(file)[1].lower() in PICTURES


def _named(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Which files say what is read of a folder, and the paths that they name."""
    for name in (*CARDS, *LISTS, *OTHERS):
        if (
            kind_at(folder / name) == PLAIN
            and (size := (folder / name).stat().st_size) > MOST_BYTES
        ):
            raise ConfigError(
                f"{folder / name} is too large: {size:,} bytes, {MOST_BYTES:,} at most, for all of "
                "it is read; remove it"
            )
    for name in CARDS:
        if (kind := kind_at(folder / name)) not in (None, PLAIN):
            raise ConfigError(f"{folder / name} is {kind}, not a file; remove it")
        if kind is not None:
            yield name, list(_of_configs(_card(folder / name).get("configs")))
    for name, key in LISTS.items():
        if kind_at(folder / name) == PLAIN:
            listed = read_object(folder / name, ConfigError, needs={key: list})[key]
            yield name, [str(each["filename"] if key == "_data_files" else each) for each in listed]


def _card(file: Path) -> dict[str, Any]:
    found = read_yaml(file, _front if file.suffix == ".md" else bytes)
    return found if isinstance(found, dict) else {}


def _front(page: bytes) -> bytes:
    """The YAML before the text of a card, as the hub's library finds it."""
    found = REGEX_YAML_BLOCK.search(page.decode(errors="replace"))
    return found[2].encode() if found else b""


def _of_configs(configs: Any) -> Iterator[str]:
    """The paths and patterns of `configs`."""
    for config in configs if isinstance(configs, list) else ():
        if isinstance(config, dict):
            for key in ("data_files", "data_dir"):
                yield from _texts(config.get(key), set())


def _texts(value: Any, seen: set[int]) -> Iterator[str]:
    """All texts within a value, of which a YAML may hold one part many times."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict) and id(value) not in seen:
        seen.add(id(value))
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item, seen)


def _leads_out(text: str) -> bool:
    """Whether a path or pattern is no relative one that stays below: an address, /x, ../x, ~x."""
    has_scheme = "::" in text or bool(urlsplit(text).scheme)
    return has_scheme or text.startswith(("/", "~")) or ".." in Path(text).parts


def _links(folder: Path) -> Iterator[str]:
    """Every link below a folder, none followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                yield entry.path
            elif entry.is_dir(follow_symlinks=False):
                yield from _links(Path(entry.path))
