"""Imports go one way, and each heavy package has one owner (docs/architecture.md)."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "phi3v"

# A layer may import those below it; packages of one line do not import each other.
LAYERS = (
    {"errors", "printing", "shapes"},
    {"addresses", "content"},
    {"reading"},
    {"stored"},
    {
        "geometry",
        "files",
        "places",
        "progress",
        "page",
        "config",
        "devices",
        "functions",
        "private",
        "output",
    },
    {"sample", "views", "pictures", "lines", "locks"},
    {"processing", "data", "model"},
    {"prepare", "evaluation"},
    {"training", "view"},
    {"export"},
    {"samples", "replay"},
)
OWNERS = {
    "deepspeed": {
        "training/zero.py",
        "training/extensions.py",
        "training/checkpoints/writer.py",
        "training/checkpoints/convert.py",
    },
    "wandb": {"training/tracking/wandb.py"},
    "rapidfuzz": {"evaluation/metrics/text.py"},
    "sacrebleu": {"evaluation/metrics/bleu.py"},
    "pyarrow": {"data/", "prepare/"},
    "datasets": {"data/", "prepare/"},
    "httpcore": {"prepare/web.py", "prepare/network.py"},
    "PIL": {
        "data/codecs.py",
        "processing/",
        "prepare/images.py",
        "samples/",
        "evaluation/",
        "page.py",
    },
    "yaml": {"config/", "training/run_folder.py", "export/", "prepare/reach.py"},
}
BANNED = {"utils", "helpers", "common", "misc", "base", "manager"}
FILES = sorted(PACKAGE.rglob("*.py"))


@cache
def imported(path: Path) -> tuple[str, ...]:
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""


def layer_of(part: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if part in layer)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_what_lies_below_it(path: Path) -> None:
    own = part_of(path)
    if own == "__init__":
        return  # registers model and processor, nothing else
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "phi3v" or len(parts) == 1 or parts[1] == own:
            continue
        allowed = layer_of(parts[1]) < layer_of(own)
        assert allowed, f"{path.relative_to(ROOT)} imports {name}, which is not below it"


@pytest.mark.parametrize("package", OWNERS)
def test_a_heavy_package_has_its_owners_only(package: str) -> None:
    users = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        if any(name.split(".")[0] == package for name in imported(path))
    }
    strangers = {user for user in users if not user.startswith(tuple(OWNERS[package]))}
    assert users and not strangers


def test_every_module_is_named_after_what_it_is_and_says_so() -> None:
    for path in FILES:
        assert path.stem not in BANNED, path
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if tree.body:
            assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no first paragraph"


def test_commands_are_thin() -> None:
    commands = sorted((ROOT / "launch").glob("*.py"))
    assert commands
    for path in commands:
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= 60, f"launch/{path.name} has {lines} lines; move work into phi3v/"


# Who parses what is no file: a line, a cell, an answer, an override, what a library gives as text.
PARSERS = {
    "config/load.py",  # the one reader of YAML; an override
    "config/deepspeed.py",  # by its own parser, which refuses a key that is there twice
    "data/reader.py",  # a cell of a shard
    "evaluation/metrics/structured.py",  # an answer
    "evaluation/requests.py",  # a line, by its own parser
    "export/target.py",  # a file of the hub, too
    "lines.py",  # a line
    "prepare/fetch.py",  # an entry of the cache: a damaged one is as none
    "prepare/manifest.py",  # what was just written
    "prepare/rejections.py",  # an id
    "prepare/text.py",  # a row
    "prepare/typed.py",  # a schema's metadata
    "processing/prompt.py",  # a tokenizer's definition
    "samples/tiny.py",  # a tokenizer's definition
    "stored.py",  # the one reader of files
    "training/zero.py",  # what a rank sent
}


def test_a_file_of_json_or_yaml_is_read_by_the_one_reader_of_such_files() -> None:
    """Which looks at its kind and size first, and says which file it is that is damaged."""
    parses = {"json.load", "json.loads", "yaml.load", "yaml.safe_load"}
    found = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in parses
    }
    assert found <= PARSERS, "take phi3v.stored.read_object, or config.read_yaml"
