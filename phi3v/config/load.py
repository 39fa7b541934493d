"""Read a recipe: YAML file, then dotted overrides, into the frozen dataclasses of `schema.py`.

    cfg = load_recipe(RunConfig, Path("launch/recipes/demo.yaml"), ["train.max_steps=20"])

Defaults give way to the file, the file to the overrides. What the schema does not know, or knows
as another type, is refused by its full dotted key; all that is wrong is told at once. Two traps of
YAML are met here: PyYAML follows YAML 1.1, which reads `2e-5` as a text (accepted where a float is
due), and it lets the second of two equal keys win silently (refused).
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from phi3v.config.dataset import DatasetConfig
from phi3v.config.keys import SECTIONS
from phi3v.config.names import nearest
from phi3v.config.schema import EvaluationConfig, RunConfig, SuiteConfig
from phi3v.errors import ConfigError
from phi3v.reading import PLAIN, kind_at
from phi3v.stored import read_bytes

Recipe = TypeVar("Recipe", RunConfig, DatasetConfig, EvaluationConfig, SuiteConfig)

MOST_VALUES = 100_000
"""Of a recipe, each time that an alias refers to one."""
BATCH_KEYS = (
    *("batch_size", "train_batch_size", "global_batch_size", "micro_batch_size", "batch"),
    *("per_device_train_batch_size", "train_micro_batch_size_per_gpu"),
    *("gradient_accumulation_steps", "accumulation_steps", "grad_accum"),
)
"""Names that other programs give to the batch and its parts."""


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """Where values came from, so that an error can say where to look."""

    root: type
    """The recipe's class: what keys there are."""

    file: Path
    """The recipe file."""

    overrides: dict[str, str]
    """Overrides as they were given, by their key."""

    def override_of(self, key: str) -> str | None:
        """The last override of `key` or its section, None if the file alone sets it."""
        for overridden, text in reversed(self.overrides.items()):
            if f"{key}.".startswith((f"{overridden}.", f"{overridden}[")):
                return text
        return None

    def of(self, key: str) -> str:
        """Name the place that set `key`: an override, or the file."""
        text = self.override_of(key)
        return str(self.file) if text is None else f"override {text!r}"

    def of_fault(self, fault: str, cls: type, prefix: str) -> str:
        """Name the places of all keys that a section's fault is about.

        They are named before its first semicolon; what stands after it is advice.
        """
        about = fault.partition(";")[0]
        keys = [prefix + field.name for field in fields(cls)]
        named = [key for key in keys if re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", about)]
        return " and ".join(dict.fromkeys(map(self.of, named or [prefix.rstrip(".")])))


class _Faults(ConfigError):
    """All that is wrong with a section and those in it, one message each."""

    def __init__(self, messages: Sequence[str]) -> None:
        super().__init__(_told(messages))
        self.messages = messages


def _told(messages: Sequence[str]) -> str:
    """Several faults in the one line that a command ends with."""
    if len(messages) == 1:
        return messages[0]
    numbered = (f"({number}) {message}" for number, message in enumerate(messages, 1))
    return f"{len(messages)} mistakes: {' '.join(numbered)}"


def load_recipe(cls: type[Recipe], path: Path, overrides: Sequence[str]) -> Recipe:
    """Read the recipe at `path`, apply `overrides` (`section.key=value`) and build a `cls`.

    Raises: ConfigError naming the file or override, and the full key.
    """
    return build_recipe(cls, read_mapping(path), path, overrides)


def build_recipe(
    cls: type[Recipe], tree: dict[str, Any], path: Path, overrides: Sequence[str]
) -> Recipe:
    """Build a `cls` of values that are read already; errors name `path` as their place.

    Raises: ConfigError naming the file or override, and the full key.
    """
    _refuse_other_kind(cls, tree, path)
    parsed = [_parse_override(text) for text in overrides]
    for (key, value), text in zip(parsed, overrides, strict=True):
        tree = _with(tree, key, value, text)
    texts = {key: text for (key, _), text in zip(parsed, overrides, strict=True)}
    try:
        recipe: Recipe = _build(cls, tree, "", _Origin(root=cls, file=path, overrides=texts))
    except _Faults as faults:
        raise ConfigError(str(faults)) from None  # a command's line begins with the class's name
    return recipe


def _refuse_other_kind(cls: type, tree: Mapping[str, Any], path: Path) -> None:
    """Refuse a recipe of another command, instead of each of its keys."""
    kinds = {
        DatasetConfig: "a dataset's recipe, for launch/prepare.py",
        RunConfig: "a run's recipe, for launch/train.py",
    }
    fits = {kind: len(tree.keys() & get_type_hints(kind).keys()) for kind in kinds}
    likeliest = max(fits, key=lambda kind: fits[kind])
    if cls in kinds and fits[likeliest] > 1 and fits[cls] * 2 < fits[likeliest]:
        raise ConfigError(f"{path} is {kinds[likeliest]}; this is to be {kinds[cls]}")


def deepspeed_overrides(overrides: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Part overrides into those of the recipe and those of the DeepSpeed JSON.

    returns  the recipe's as they are, and the JSON's values by dotted key

    "deepspeed.bf16.enabled=no" sets "bf16.enabled" of the JSON; "deepspeed=FILE" and the keys cpu
    and cuda below it are the recipe's own.

    Raises: ConfigError for a text that is not `section.key=value`.
    """
    own, of_json = [], {}
    for text in overrides:
        key, value = _parse_override(text)
        section, _, rest = key.partition(".")
        if section == "deepspeed" and rest and rest not in ("cpu", "cuda"):
            of_json[rest] = value
        else:
            own.append(text)
    return own, of_json


def to_dict(cfg: RunConfig | DatasetConfig) -> dict[str, Any]:
    """Turn a recipe into plain values that YAML and JSON can hold."""
    plain: dict[str, Any] = _plain(cfg)
    return plain


def dump_yaml(cfg: RunConfig | DatasetConfig) -> str:
    """Write a recipe as YAML with every key; `load_recipe` reads the same recipe from it."""
    return yaml.safe_dump(to_dict(cfg), sort_keys=False, width=100)


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """List the dotted keys whose values differ, as `differences` has them.

    Example: {"optim": {"lr": 1.0}} and {"optim": {"lr": 2.0}} give ["optim.lr"].
    """
    return list(differences(a, b))


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Both values of each dotted key whose values differ; one that a recipe does not have is null.

    So a recipe written before an optional key existed is the same as one that does not use it.

    Example: {"optim": {"lr": 1.0}} and {"optim": {"lr": 2.0}} give {"optim.lr": (1.0, 2.0)}.
    """
    left, right = dict(_flatten(a)), dict(_flatten(b))
    keys = dict.fromkeys([*left, *right])
    pairs = {key: (left.get(key), right.get(key)) for key in keys}
    return {key: (one, other) for key, (one, other) in pairs.items() if one != other}


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values of a recipe file, as they stand there.

    Raises: ConfigError naming the file and what is wrong with it.
    """
    if (kind := kind_at(path)) not in (None, PLAIN):
        raise ConfigError(f"recipe {path} is {kind}; name a YAML file, see launch/recipes/")
    if kind is None:
        near = [each for each in map(path.with_suffix, (".yaml", ".yml")) if each.is_file()]
        hint = f"did you mean {near[0]}?" if near else "name a YAML file, see launch/recipes/"
        raise ConfigError(f"recipe {path} does not exist; {hint}")
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, got {_show(tree)}")
    return tree


def read_yaml(path: Path, part: Callable[[bytes], bytes] = bytes) -> Any:
    """The value of a file of YAML, or of a part of it.

    Raises: ConfigError naming the file and what is wrong with it, as a key that is there twice.
    """
    try:
        content = part(read_bytes(path))
        node = yaml.compose(content, Loader=yaml.SafeLoader)
        _count_values(node, {})  # before anything goes through them
        _refuse_duplicates(node)
        return yaml.safe_load(content)
    except RecursionError:
        raise ConfigError(f"{path} is not valid YAML: its values lie too deep in others") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
        raise ConfigError(f"{path} is not valid YAML{_describe(error)}") from None


def _count_values(node: yaml.Node | None, known: dict[int, float]) -> float:
    """How many values a node stands for, those of its aliases counted each time.

    Ten lines of ten aliases each make 10,000,000,000, and nothing that goes through them ends.

    known  of nodes that were counted, by their identity; infinity while one is counted, which an
           alias in itself refers to
    Raises: yaml.MarkedYAMLError
    """
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf
        pairs = isinstance(node, yaml.MappingNode)
        inner = [each for pair in node.value for each in pair] if pairs else node.value
        known[id(node)] = 1 + sum(_count_values(each, known) for each in inner)
    if known[id(node)] > MOST_VALUES:
        problem = f"with its aliases it has more than {MOST_VALUES:,} values"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return known[id(node)]


def _refuse_duplicates(node: yaml.Node | None) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item)
    if isinstance(node, yaml.MappingNode):
        _refuse_same_keys([key for key, _ in node.value])
        for _, value in node.value:
            _refuse_duplicates(value)


def _refuse_same_keys(keys: Sequence[yaml.Node]) -> None:
    seen: set[str] = set()
    for key in keys:
        if str(key.value) in seen:
            problem = f"key {key.value!r} is there twice"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        seen.add(str(key.value))


def _describe(error: yaml.YAMLError | ValueError) -> str:
    """Say where and why YAML could not be read: " at line 3: found character ..."."""
    mark = getattr(error, "problem_mark", None)
    line = f" at line {mark.line + 1}" if mark else ""
    return f"{line}: {_problem(error)}"


def _problem(error: yaml.YAMLError | ValueError) -> str:
    """Give the one line of YAML's message that says what is wrong."""
    text = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return str(text)


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override {text!r} must have the form section.key=value")
    try:
        return key, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            f"the value of override {text!r} is not valid YAML: {_problem(error)}; if a text is "
            f"meant, write {_quoted(text)}"
        ) from None


def _quoted(override: str) -> str:
    """An override whose value is a text, as a shell takes it: the shell eats a pair of quotes.

    wandb.name=42 -> 'wandb.name="42"'
    """
    key, _, value = override.partition("=")
    return shlex.quote(f"{key}={json.dumps(value, ensure_ascii=False)}")


def _with(tree: Mapping[str, Any], key: str, value: Any, text: str) -> dict[str, Any]:
    """Copy the tree with one override's value in it, opening the sections on the way."""
    name, dot, rest = key.partition(".")
    if not dot:
        return {**tree, name: value}
    section = {} if tree.get(name) is None else tree[name]
    if not isinstance(section, dict):
        raise ConfigError(
            f"override {text!r} sets a key of {name!r}, which is {_show(section)}; to put "
            f"a section in its place, write '{_as_section(text, rest)}'"
        )
    return {**tree, name: _with(section, rest, value, text)}


def _as_section(text: str, rest: str) -> str:
    """An override of a whole section: of a.b.c=1 with the rest b.c it is a={b: {c: 1}}."""
    key, _, value = text.partition("=")
    inner = rest.replace(".", ": {")
    return f"{key.removesuffix(f'.{rest}')}={{{inner}: {value}{'}' * (rest.count('.') + 1)}"


def _build(cls: type, tree: Mapping[str, Any], prefix: str, origin: _Origin) -> Any:
    """Build one section, and the sections in it, from its part of the tree.

    Raises: _Faults with every unknown or missing key and every wrong type; where there are none,
    with the first value that the section itself refuses.
    """
    hints = get_type_hints(cls)
    strange = [str(name) for name in tree if name not in hints]
    faults = [_unknown_key(name, prefix, list(hints), origin) for name in strange]
    values = {}
    for field in fields(cls):
        key, kind = prefix + field.name, hints[field.name]
        if field.name in tree or is_dataclass(kind):
            try:
                values[field.name] = _cast(tree.get(field.name), kind, key, origin)
            except ConfigError as error:
                faults += error.messages if isinstance(error, _Faults) else [str(error)]
        elif field.default is MISSING:
            place = origin.of(key)
            faults.append(f"missing key {key!r} in {place}; write it there or add {key}=VALUE")
    if faults:
        raise _Faults(faults)
    try:
        return cls(**values)
    except ConfigError as error:
        place = origin.of_fault(str(error), cls, prefix)
        raise _Faults([f"{error} (in {place})"]) from None


def _unknown_key(name: str, prefix: str, names: list[str], origin: _Origin) -> str:
    """Explain an unknown key: whose it is, the same name in another section, or a similar one."""
    key = prefix + name
    moved = [other for other in _value_keys(origin.root, "") if other.endswith(f".{name}")]
    hint = f"did you mean {moved[0]!r}?" if moved else nearest(name, names, prefix)
    if origin.root is RunConfig and not moved:
        hint = _deepspeeds(name, prefix) or hint
    return f"unknown key {key!r} in {origin.of(key)}; {hint}"


def _deepspeeds(name: str, prefix: str) -> str | None:
    """Where to set what the DeepSpeed JSON owns, None for what it does not."""
    if prefix not in ("", "train.", "data.", "optim."):
        return None
    if name in BATCH_KEYS:
        return (
            "the DeepSpeed JSON owns the batch, in packs over all ranks: set "
            "deepspeed.train_batch_size=N on the command line; data.max_tokens is the size of a "
            "pack, and accumulation follows from the number of ranks"
        )
    if name in SECTIONS[""]:
        return f"the DeepSpeed JSON owns it: set it there, or deepspeed.{name} on the command line"
    return None


def _value_keys(cls: type, prefix: str) -> Iterator[str]:
    """List the full keys of all values, not of sections."""
    for name, kind in get_type_hints(cls).items():
        kind = get_args(get_args(kind)[1])[0] if _is_one_or_many(kind) else kind
        if isinstance(kind, type) and is_dataclass(kind):
            yield from _value_keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def _cast(value: Any, kind: Any, key: str, origin: _Origin) -> Any:
    """Turn a YAML value into the type that the schema asks for, or refuse it."""
    options = get_args(kind)
    if is_dataclass(kind):
        return _cast_section(value, kind, key, origin)
    if _is_one_or_many(kind):
        one, many = options
        return _cast(value, many if isinstance(value, list) else one, key, origin)
    if len(options) == 2 and is_dataclass(options[1]):  # a value, or a section of its own
        other, *sections = options
        return _cast(value, sections[0] if isinstance(value, dict) else other, key, origin)
    if NoneType in options:
        inner = reduce(or_, (option for option in options if option is not NoneType))
        return None if value is None else _cast(value, inner, key, origin)
    if get_origin(kind) is Literal:
        return _cast_choice(value, options, key, origin)
    if get_origin(kind) is tuple:
        return _cast_list(value, options[0], key, origin)
    if kind is float:
        return _cast_float(value, key, origin)
    if type(value) is not kind:
        raise _wrong_type(value, kind.__name__, key, origin)
    return value


def _is_one_or_many(kind: Any) -> bool:
    """Whether a schema's type is `X | tuple[Y, ...]`: one value or a list."""
    options = get_args(kind)
    return len(options) == 2 and get_args(options[1])[1:] == (Ellipsis,)


def _cast_section(value: Any, kind: Any, key: str, origin: _Origin) -> Any:
    if value is not None and not isinstance(value, dict):
        raise _wrong_type(value, "a section with keys of its own", key, origin)
    return _build(kind, value or {}, f"{key}.", origin)


def _cast_choice(value: Any, choices: tuple[str, ...], key: str, origin: _Origin) -> str:
    if not isinstance(value, str) or value not in choices:
        raise _wrong_type(value, f"one of {', '.join(choices)}", key, origin)
    return value


def _cast_list(value: Any, kind: Any, key: str, origin: _Origin) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _wrong_type(value, "a list, [a, b]", key, origin)
    return tuple(_cast(item, kind, f"{key}[{i}]", origin) for i, item in enumerate(value))


def _cast_float(value: Any, key: str, origin: _Origin) -> float:
    """Accept a number, or the text `2e-5`; refuse booleans, nan and infinity."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _wrong_type(value, "float", key, origin)
    return number


def _wrong_type(value: Any, expected: str, key: str, origin: _Origin) -> ConfigError:
    hint, text = "", origin.override_of(key)
    if expected == "str" and value is not None and not isinstance(value, list):
        if text is None:
            hint = "; put it in quotes"
        elif text.startswith(f"{key}="):
            hint = f"; write {_quoted(text)}"
        else:  # in [...] or {...}
            hint = "; put it in double quotes, and the whole override in single ones"
    return ConfigError(f"{key} must be {expected}, got {_show(value)} in {origin.of(key)}{hint}")


def _show(value: Any) -> str:
    return "nothing" if value is None else repr(value)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for index, item in enumerate(value):
                yield from _flatten(item, f"{prefix}{name}[{index}].")
        else:
            yield f"{prefix}{name}", value
