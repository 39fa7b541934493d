"""One HTML page that needs nothing else: the frame and look which all pages of the project share.

    text = html_page("products", heading("products", [("rows", "3,000")]) + body, OWN_STYLE)

Style and pictures are inline, there is no script, and a content policy forbids any request. Control
characters are shown by their numbers, wherever they come from, and so are those that turn the order
of a line around. The page follows the reader's light or dark setting, fits a phone, and prints.
"""

import base64
import io
from collections.abc import Iterable, Mapping
from html import escape

import numpy as np
from PIL import Image

from phi3v.printing import LINES, printable

JOINERS = "\u200c\u200d"  # of letters and emoji; they order nothing
QUALITIES = (85, 60, 35)  # of JPEG, tried until a picture is small enough


def html_page(title: str, body: str, style: str = "") -> str:
    """Frame a body of HTML; `style` follows the shared rules."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{clean(escape(title))}</title>\n<style>{PAGE_STYLE}{style}</style>\n</head>\n"
        f"<body>\n<main>\n{clean(body)}</main>\n</body>\n</html>\n"
    )


def clean(text: str) -> str:
    """A text for readers, of many lines and in any script, without what could play with them."""
    return printable(text, LINES + JOINERS)


def heading(title: str, facts: Iterable[tuple[str, str]], below: str = "") -> str:
    """The page's heading and its key facts, each what it is and its value; `below` is HTML."""
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for label, value in facts
    )
    return f'<header><h1>{escape(title)}</h1><div class="tiles">{tiles}</div>{below}</header>\n'


def facts_section(title: str, facts: Mapping[str, str]) -> str:
    """A table of names and values; "" where there are none."""
    if not facts:
        return ""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>\n"
        for name, value in facts.items()
    )
    return (
        f'<section id="{escape(title).lower()}"><h2>{escape(title)}</h2>'
        f'<table class="facts"><tbody>{rows}</tbody></table></section>\n'
    )


def jpeg_url(pixels: np.ndarray, side: int, max_bytes: int | None = None) -> str:
    """A picture, no longer than `side` pixels either way, as a data URL.

    pixels     (height, width, 3) uint8
    max_bytes  above which a lower quality is taken, down to the last of QUALITIES
    """
    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side))
    for quality in QUALITIES:
        jpeg = io.BytesIO()
        picture.save(jpeg, "JPEG", quality=quality)
        if max_bytes is None or jpeg.tell() <= max_bytes:
            break
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode("ascii")


PAGE_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b212a; --muted: #5d6774; --rule: #dfe4ea;
  --panel: #f6f8fa; --right: #1d7a3c; --wrong: #b3261e; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #14181d; --ink: #e4e8ed; --muted: #98a3b0; --rule: #333b45; --panel: #1c2229;
    --right: #6fce8d; --wrong: #ff8f86; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 16px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 10px; break-after: avoid; }
.note { color: var(--muted); margin: 8px 0; max-width: 75ch; text-wrap: pretty; }
.muted { color: var(--muted); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; }
.tile { background: var(--panel); border: 1px solid var(--rule); border-radius: 6px;
  padding: 10px 14px; }
.tile b { display: block; font-size: 22px; line-height: 1.3; }
.tile span { display: block; color: var(--muted); font-size: 0.87em; line-height: 1.35; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 8px 14px 8px 0;
  border-bottom: 1px solid var(--rule); font-variant-numeric: tabular-nums; }
thead th { color: var(--muted); font-size: 0.87em; font-weight: 600; }
tbody th { font-weight: 600; }
tr { break-inside: avoid; }
small { display: block; color: var(--muted); font-size: 0.87em; font-weight: 400; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr));
  gap: 18px 28px; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
code, .text, small, summary { unicode-bidi: isolate; }
.facts th { width: 32%; font-weight: 400; color: var(--muted); }
.facts th, .facts td { padding-top: 5px; padding-bottom: 5px; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 14px 0 0; }
nav a { color: var(--muted); }
summary { cursor: pointer; padding: 4px 0; }
pre { margin: 4px 0 14px; padding: 10px 14px; background: var(--panel); border-radius: 6px;
  font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
@media screen and (max-width: 680px) {
  main { padding: 18px 14px 32px; }
  .tiles { grid-template-columns: 1fr 1fr; } }
@media print { main { max-width: none; padding: 0; } body { font-size: 12px; }
  nav { display: none; } pre { font-size: 10px; }
  details::details-content { content-visibility: visible; block-size: auto; }
  .charts { grid-template-columns: 1fr 1fr; } }
"""
