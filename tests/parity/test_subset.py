"""The committed goldens are a subset of those beside the checkout, byte for byte."""

from tests.parity.goldens import COMMITTED, SHARED, needs_reference


@needs_reference
def test_the_committed_goldens_are_unchanged() -> None:
    files = [path for path in COMMITTED.rglob("*") if path.is_file() and path.suffix != ".md"]
    assert files
    for path in files:
        original = SHARED / "goldens" / path.relative_to(COMMITTED)
        assert path.read_bytes() == original.read_bytes(), path
