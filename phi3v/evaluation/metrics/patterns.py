"""The form of an answer, which turns it into named fields."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter

from phi3v.errors import ConfigError

# At most 15 digits on each side, which a float64 holds: a model that repeats a digit for ever gives
# an answer that does not parse, rather than a mean of infinity.
_REGEX = {
    str: r".*?",
    float: r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3}){1,4}|[0-9]{1,15})(?:\.[0-9]{1,15})?",
}

# 1.25 with a zero to spare, or a thousand and more where points group digits.
_DOUBTFUL = re.compile(r"[-+]?[0-9]{1,3}\.[0-9]{3}")

Fields = Mapping[str, str | float]


@dataclass(frozen=True)
class Pattern:
    """The form of an answer: literal text with named fields. Made by `compile_pattern`."""

    template: str
    fields: Mapping[str, type]
    regex: re.Pattern[str]

    def parse(self, text: str) -> dict[str, str | float] | None:
        """Read the fields of a text; None where the text as a whole does not fit.

        White space around the text is ignored; a float field reads "1,250" as 1250.0.
        """
        match = self.regex.fullmatch(text.strip())
        if match is None:
            return None
        found = match.groupdict()
        return {
            name: float(found[name].replace(",", "")) if kind is float else found[name]
            for name, kind in self.fields.items()
        }

    def doubtful_number(self, text: str) -> str | None:
        """The first number of a text that elsewhere means another: "1.250", read as 1.25."""
        match = self.regex.fullmatch(text.strip())
        numbers = (
            (match[name] for name, kind in self.fields.items() if kind is float) if match else ()
        )
        return next((number for number in numbers if _DOUBTFUL.fullmatch(number)), None)


def compile_pattern(template: str) -> Pattern:
    """Compile "Product: {title}, Price: {price:float}" into a `Pattern`.

    A field is `{name}`, `{name:str}` or `{name:float}`; all else is literal, `{{` and `}}` are
    braces. A str field is as short as the text after it allows, and may be empty.

    Raises: ConfigError naming the template and what is wrong with it.
    """
    fields: dict[str, type] = {}
    regex = ""
    for literal, name, kind in _split(template.strip()):
        regex += re.escape(literal)
        if name is None:
            continue
        if fields and not literal:
            raise _refusal(template, f"no text between {{{name}}} and the field before it")
        if name in fields:
            raise _refusal(template, f"the field {{{name}}} twice")
        fields[name] = _field_type(template, name, kind)
        regex += f"(?P<{name}>{_REGEX[fields[name]]})"
    if not fields:
        raise _refusal(template, "no field")
    return Pattern(template.strip(), fields, re.compile(regex, re.DOTALL))


def _split(template: str) -> list[tuple[str, str | None, str]]:
    """Split a template into (literal text before the field, field name, field type).

    A last item with the name None holds the text after the last field.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise _refusal(template, f"unbalanced braces ({error})") from error
    pieces: list[tuple[str, str | None, str]] = []
    text = ""
    for literal, name, kind, conversion in parts:  # an escaped brace ends a part without a field
        text += literal
        if name is None:
            continue
        if conversion or not (name.isidentifier() and name.isascii()):
            raise _refusal(template, f"the unknown field {{{name}{'!' if conversion else ''}...}}")
        pieces.append((text, name, kind or "str"))
        text = ""
    return [*pieces, (text, None, "")]


def _field_type(template: str, name: str, kind: str) -> type:
    if kind not in ("str", "float"):
        raise _refusal(template, f"the unknown type '{kind}' in {{{name}:{kind}}}")
    return float if kind == "float" else str


def _refusal(template: str, fault: str) -> ConfigError:
    return ConfigError(
        f"eval.pattern '{template}' has {fault}; write each field once as {{name}} or "
        "{name:float}, with text between two fields, for example 'Product: {title}, "
        "Price: {price:float}'"
    )
