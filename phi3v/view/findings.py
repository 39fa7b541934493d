"""What the label audit found, and which rows were rejected: the parts that ask for attention."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from phi3v.data.audit import SUSPICIONS, describe_answers
from phi3v.data.format import PREPARE_AGAIN, REJECTED, advice
from phi3v.errors import ShardError
from phi3v.lines import numbered_lines, read_record
from phi3v.shapes import COUNT

REJECTION = {"reason": str, "source": str, "row": COUNT, "id": object}  # an id is any JSON
EXAMPLES = 3  # rejected rows shown of each reason


def audit_section(audit: Mapping[str, Any]) -> str:
    """Suspicious masks, and the longest and shortest samples."""
    found = audit["suspicious"]
    count = sum(kind["count"] for kind in found.values())
    verdict = "Some masks look wrong." if count else "No mask looks wrong."
    rows = "".join(
        _suspicion(text, found.get(kind, {"count": 0, "examples": []}))
        for kind, text in SUSPICIONS.items()
    )
    return (
        f'<section id="audit"><h2>Label audit</h2><p class="note">{audit["samples"]:,} samples, '
        f"{100 * audit['label_share']:.1f}% of their tokens trained; "
        f"{describe_answers(audit['answers'])}. {verdict}</p>"
        '<table class="list"><thead><tr><th>looked for</th><th class="number">samples</th>'
        f"<th>{'such as' if count else ''}</th></tr></thead><tbody>{rows}</tbody></table>"
        f'<div class="charts">{_extremes("Longest samples", audit["longest"])}'
        f"{_extremes('Shortest samples', audit['shortest'])}</div></section>\n"
    )


def rejected_section(folder: Path, manifest: Mapping[str, Any]) -> str:
    """Rejected rows by reason, most frequent first.

    Raises: ShardError if rejected.jsonl is missing, damaged or not the manifest's.
    """
    counts, examples = _read(folder / REJECTED, manifest["rejected"]["count"])
    if not counts:
        return '<section id="rejected"><h2>Rejected rows</h2><p class="note">None.</p></section>\n'
    rows = "".join(_reason(reason, n, examples[reason]) for reason, n in counts.most_common())
    total, rows_read = sum(counts.values()), manifest["rows"]
    return (
        f'<section id="rejected"><h2>Rejected rows</h2><p class="note">{total:,} of '
        f"{rows_read:,} rows ({100 * total / rows_read:.2g}%); {REJECTED} lists them all.</p>"
        '<table class="list"><thead><tr><th>reason</th><th class="number">rows</th><th>such as</th>'
        f"</tr></thead><tbody>{rows}</tbody></table></section>\n"
    )


def _suspicion(text: str, found: Mapping[str, Any]) -> str:
    style = "wrong" if found["count"] else "muted"
    names = ", ".join(f"<code>{escape(name)}</code>" for name in found["examples"])
    return (
        f'<tr class="{style}"><td>{escape(text)}</td><td class="number">{found["count"]:,}</td>'
        f"<td>{names}</td></tr>\n"
    )


def _extremes(title: str, samples: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f'<tr><td><code>{escape(sample["id"])}</code></td><td class="number">{sample["tokens"]:,}'
        f'</td><td class="number">{sample["label_tokens"]:,}</td></tr>\n'
        for sample in samples
    )
    return (
        f'<div><h3>{title}</h3><table class="list"><thead><tr><th>id</th><th class="number">tokens'
        f'</th><th class="number">trained</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _reason(reason: str, count: int, examples: Sequence[Mapping[str, Any]]) -> str:
    items = "".join(
        f"<li>{escape(entry['source'])} row {entry['row'] + 1:,}"
        f"{_id(entry['id'])}<small>{escape(entry['reason'])}</small></li>"
        for entry in examples
    )
    return (
        f'<tr><td>{escape(reason)}</td><td class="number">{count:,}</td><td><ul>{items}</ul></td>'
        "</tr>\n"
    )


def _id(name: Any) -> str:
    text = name if isinstance(name, str) else json.dumps(name)
    return "" if name is None else f", id <code>{escape(text)}</code>"


def _read(path: Path, expected: int) -> tuple[Counter[str], dict[str, list[dict[str, Any]]]]:
    counts: Counter[str] = Counter()
    examples: dict[str, list[dict[str, Any]]] = {}
    try:
        for _, line in numbered_lines(path):
            entry = read_record(line, REJECTION)
            reason = entry["reason"].partition(":")[0]
            counts[reason] += 1
            if counts[reason] <= EXAMPLES:
                examples.setdefault(reason, []).append(entry)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ShardError(f"{path} cannot be read ({error}); {advice(error)}") from error
    if sum(counts.values()) != expected:
        raise ShardError(
            f"{path} lists {sum(counts.values()):,} rows, the manifest says {expected:,}; "
            f"{PREPARE_AGAIN}"
        )
    return counts, examples
