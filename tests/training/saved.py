"""Checkpoints for tests: tiny files, no DeepSpeed."""

from pathlib import Path
from typing import Any

from phi3v.files import sha256
from phi3v.training.checkpoints.store import (
    MADE_FROM,
    MANIFEST,
    SavedFile,
    partial_name,
    publish,
    step_name,
    universal_name,
    write_manifest,
)

FILES = ("a.pt", "b.pt", "zero/c.pt")


def save_partial(folder: Path, step: int, content: str = "", **facts: Any) -> Path:
    """A whole checkpoint that has not got its name yet; each file other bytes of the same number.

    content  goes into every file
    """
    partial = folder / partial_name(step)
    (partial / "zero").mkdir(parents=True)
    files = {}
    for number, name in enumerate(FILES):
        (partial / name).write_bytes(f"{content}{number}{step}".encode() * 40)
        files[name] = SavedFile.of(partial / name)
    write_manifest(partial, {"step": step, **facts}, files)
    return partial


def save(folder: Path, *steps: int, content: str = "") -> Path:
    """Published checkpoints; returns the last."""
    for step in steps:
        save_partial(folder, step, content)
        publish(folder, step)
    return folder / step_name(steps[-1])


def save_universal(folder: Path, step: int) -> Path:
    """The form for any number of ranks of a published checkpoint."""
    universal = folder / universal_name(step)
    universal.mkdir()
    (universal / "fp32.pt").write_bytes(b"whole" * 40)
    facts = {"step": step, "world_size": "any", "zero_stage": 3, "saved_at": "2031-02-03T04:05:07"}
    facts[MADE_FROM] = sha256(folder / step_name(step) / MANIFEST)
    write_manifest(universal, facts, {"fp32.pt": SavedFile.of(universal / "fp32.pt")})
    return universal


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path, position: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 1
    path.write_bytes(data)


def foreign(folder: Path) -> list[str]:
    """What somebody else keeps in the folder."""
    for name in ("step-5", "step-00000005.bak", ".step-00000005.mine", "step-000000050"):
        (folder / name).mkdir()
    (folder / "step-00000006").write_text("a file")
    (folder / ".notes.txt").write_text("a hidden file")
    (folder / ".held.tmp").mkdir()
    (folder / ".link.tmp").symlink_to(folder / ".notes.txt")
    for link in ("step-00000007", ".step-00000007.old", ".step-00000007.partial"):
        (folder / link).symlink_to(folder / "step-5")
    return names(folder)
