"""Addresses of the web as they may be shown: without what may be secret."""

import re

ADDRESS = re.compile(r"([^:/?#]*:)?([/\\]*)(.*)", re.DOTALL)  # scheme, slashes and the rest
PLAIN_HOST = re.compile(r"[\w-]+(\.[\w-]+)+\.?(?=[/?#]|\Z)")  # example.org, without a port
BAD_PORT = re.compile(r"([^/?#\[\]:]*:)(?!\d*([/?#]|\Z))[^/?#]*")  # me:pw, cut off before its @
DRIVE = re.compile(r"[a-z]:[\\/]", re.IGNORECASE)  # a Windows path


def shown_url(url: str) -> str:
    """An address without what may be secret: https://me:pw@x.org/a?key=1 -> https://x.org/a?...

    The query and the fragment are left out as a whole, for they may hold a signature or a token. Of
    an address that is not written as it should be (http://me:s3/cret@x.org/ -> http://...@x.org/)
    all up to its last @ is left out, unless it begins with the plain name of a host.
    """
    found = ADDRESS.match(url)
    assert found
    scheme, slashes, rest = found[1] or "", *found.groups()[1:]
    if "@" in rest and not PLAIN_HOST.match(rest):
        mark = "" if re.fullmatch(r"[^@/?#\\]*@[^@]*", rest) else "...@"
        rest = mark + rest.rpartition("@")[2]
    rest, query, _ = rest.partition("#")[0].partition("?")
    rest = BAD_PORT.sub(r"\1...", rest, count=1) if BAD_PORT.match(rest) else rest
    return f"{scheme}{slashes}{rest}{'?...' if query else ''}"


def shown_reference(text: str) -> str:
    """A path as it is, an address as `shown_url`; also one that is none: http:/me:pw@x.org/a."""
    is_address = "://" in text or ":" in text.rpartition("@")[0]
    return shown_url(text) if is_address and not DRIVE.match(text) else text
