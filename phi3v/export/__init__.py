"""A checkpoint to an ordinary Hugging Face folder, and the opening of what was trained."""

from phi3v.export.folder import export
from phi3v.export.opening import (
    base_of,
    check_shards,
    check_step,
    evaluation_settings,
    open_any,
    open_processor,
    open_run,
    read_run,
)

__all__ = [
    "base_of",
    "check_shards",
    "check_step",
    "evaluation_settings",
    "export",
    "open_any",
    "open_processor",
    "open_run",
    "read_run",
]
