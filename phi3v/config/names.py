"""What a mistyped name may have meant; the end of every "unknown ..." error of this package."""

import difflib
from collections.abc import Sequence


def nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    """Name the most similar of the `known` names, or list them all; `prefix` goes before each.

    Example: "max_token" with the prefix "data." gives "did you mean 'data.max_tokens'?".
    """
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {prefix + close[0]!r}?"
    return f"known are {', '.join(prefix + other for other in known)}"
