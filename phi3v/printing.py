"""What is printed is clean: what others have named cannot write to the terminal that shows it.

    from phi3v.printing import print  # every module that prints; a test sees to it

A column, a file or a row's id may hold ESC, which moves the cursor and colours or hides text, or
U+202E, which turns a line around. They are shown as Python writes them in a string: \\x1b, \\u202e.
"""

import builtins
import re
import sys
import traceback
import unicodedata
from typing import Any, TextIO

LINES = "\n\t"  # what may divide a text of several lines
WORD = re.compile(r"[^\s'\"]+")
WITH_PASSWORD = re.compile("://[^/?#@:]*:")
BEYOND = re.compile("[^ -~]+")  # what ASCII prints


def printable(text: str, keep: str = "") -> str:
    """Show a text's control, format and other invisible characters by their numbers.

    Spaces of every width stay, and so does what is in `keep`. Half of a surrogate pair is shown by
    its number as well: the result can be encoded.
    """
    return BEYOND.sub(lambda found: _shown(found[0], keep), text)


def without_passwords(text: str) -> str:
    """A message without the user and password of addresses in it, whoever has put them there.

    A last look: who shows what is known to be an address uses `addresses.shown_url`.
    """
    return WORD.sub(_without_password, text) if "@" in text else text


def _without_password(word: re.Match[str]) -> str:
    """What is left of a word of a message; one expression for all of it takes n times n steps."""
    head, at, tail = word[0].rpartition("@")
    found = WITH_PASSWORD.search(head) if at else None
    return word[0] if found is None else f"{head[: found.start()]}://{tail}"


def _shown(part: str, keep: str) -> str:
    if part.isprintable():
        return part
    return "".join(c if _is_plain(c) or c in keep else ascii(c)[1:-1] for c in part)


def _is_plain(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def print(  # noqa: A001
    *values: object,
    sep: str = " ",
    end: str = "\n",
    file: TextIO | None = None,
    flush: bool = False,
) -> None:
    """Print as Python does, what is printed made `printable`; its own line breaks and tabs stay."""
    text = sep.join(printable(str(value), LINES) for value in values)
    builtins.print(text, end=end, file=sys.stdout if file is None else file, flush=flush)


def print_exception(*raised: Any) -> None:
    """Print an error that is a defect as Python does; for `sys.excepthook`."""
    print("".join(traceback.format_exception(*raised)), end="", file=sys.stderr, flush=True)
