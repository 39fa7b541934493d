"""The arithmetic of docs/performance.md: its tables hold what their formulas give."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs/performance.md").read_text(encoding="utf-8")
PARAMETERS = (
    4_146_621_440  # of the published model; tests/model/test_published_sizes.py counts them
)
GPUS = (1, 8, 32, 128)
BYTES: dict[str, Callable[[int], float]] = {
    "`zero1.json`": lambda n: 2 + 4 + 12 / n,
    "`zero2.json`": lambda n: 2 + 16 / n,
    "`zero3.json`": lambda n: 18 / n,
    "`zero3_hpz.json`": lambda n: 18 / n + 2 / 8,
    "`zero3_offload.json`, on the GPU": lambda n: 2 / n,
    "`zero3_offload.json`, on the host, for each GPU": lambda n: 16 / n,
}


def cells(first: str) -> list[str]:
    """The cells of the row that begins with `first`, without that one."""
    (row,) = re.findall(rf"^\| {re.escape(first)} \|(.*)\|$", PAGE, re.MULTILINE)
    return [cell.strip() for cell in row.split("|")]


@pytest.mark.parametrize("name", BYTES)
def test_model_states_are_bytes_times_parameters(name: str) -> None:
    _, *shown = cells(name)
    for gpus, cell in zip(GPUS, shown, strict=True):
        if cell != "-":
            assert cell == f"{PARAMETERS * BYTES[name](gpus) / 1e9:.1f}"


def test_activations_of_a_pack_are_those_of_its_tokens_and_views() -> None:
    layer, view_layer = (
        [float(cell.removesuffix(" KB")) for cell in cells(first)]
        for first in ("a decoder layer", "a tower layer")
    )
    tokens = [f"{32 * kilobytes / 1e3:.2f} MB" for kilobytes in layer]
    views = [f"{23 * 577 * kilobytes / 1e3:.0f} MB" for kilobytes in view_layer]
    assert cells("all 32, a token") == tokens
    assert cells("all 23, a view of 577 tokens") == views
    packs = [
        f"{8192 * 32 * a / 1e6 + 52 * 23 * 577 * b / 1e6:.1f} GB"
        for a, b in zip(layer, view_layer, strict=True)
    ]
    text = " ".join(PAGE.split())
    none, selective, full = packs
    assert f"= {none} without recomputation, {selective} selectively, and {full} in full" in text
