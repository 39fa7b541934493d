"""Checks of single values; keys are written `section__field` and shown with dots."""

import re
from collections.abc import Collection

from phi3v.errors import ConfigError

LATEX = (
    "u|e|eq|eg|i|abla|ot|otin|ewline|ewcommand|mid|onumber|olimits|sim|leq|geq|leftarrow|rightarrow"
)
TYPED_BREAK = re.compile(rf"(?<!\\)\\n(?!(?:{LATEX})(?![A-Za-z]))")


def at_least(low: int | float, **values: int | float | None) -> None:
    """Refuse a value under `low`; keys are written `section__field`, None passes."""
    for name, value in values.items():
        if value is not None and value < low:
            raise ConfigError(f"{_dotted(name)} must be at least {low}, got {value!r}")


def above_zero(hint: str, **values: float | None) -> None:
    """Refuse a value that is not above 0, and say with `hint` what to write instead."""
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ConfigError(f"{_dotted(name)} must be above 0, got {value!r}; {hint}")


def filled(**values: str | None) -> None:
    """Refuse an empty text; None passes."""
    for name, value in values.items():
        if value is not None and not value.strip():
            raise ConfigError(f"{_dotted(name)} must not be empty, got {value!r}")


def real_breaks(what: str, advice: str, **values: str | None) -> None:
    """Refuse a text in which a line break was typed as two characters, a backslash and an n.

    So a shell hands it on, and YAML unless it stands in double quotes; the model would be shown
    the two characters. LaTeX's commands (nu, neq) are no line breaks.
    """
    for name, value in values.items():
        if value is not None and TYPED_BREAK.search(value):
            raise ConfigError(
                f"{what}{_dotted(name)} holds a backslash and an n, which are no line break, in "
                f"{value!r}; {advice}"
            )


def distinct(**values: Collection[str]) -> None:
    """Refuse a list that holds an entry twice."""
    for name, entries in values.items():
        twice = [entry for entry in dict.fromkeys(entries) if list(entries).count(entry) > 1]
        if twice:
            raise ConfigError(f"{_dotted(name)} holds {twice[0]!r} twice; keep one")


def _dotted(name: str) -> str:
    return name.replace("__", ".")
