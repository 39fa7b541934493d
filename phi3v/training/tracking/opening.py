"""Which sinks a recipe asks for, checked and opened."""

from importlib.util import find_spec
from pathlib import Path

from phi3v.config import RunConfig
from phi3v.errors import ConfigError
from phi3v.training.tracking.jsonl import JsonSink
from phi3v.training.tracking.tensorboard import TensorboardSink
from phi3v.training.tracking.tracker import PATIENCE_SECONDS, SLOW, Tracker
from phi3v.training.tracking.wandb import WandbSink, check_wandb, mode_of


def check_sinks(cfg: RunConfig) -> None:
    """Refuse sinks that could not be told anything.

    Raises: ConfigError if a package, a key or a best checkpoint is missing.
    """
    if "tensorboard" in cfg.tracking.sinks and not find_spec("tensorboard"):
        raise ConfigError(
            "tracking.sinks has 'tensorboard', but the package tensorboard is not installed; run "
            "pip install tensorboard, or remove it from tracking.sinks"
        )
    if cfg.wandb.log_checkpoint == "best" and not cfg.checkpoint.best:
        raise ConfigError(
            "wandb.log_checkpoint is 'best', but checkpoint.best names nothing to be best by; set "
            "it to 'loss' or a metric, or wandb.log_checkpoint to 'last'"
        )
    check_wandb(cfg.wandb)


def open_tracker(
    cfg: RunConfig, folder: Path, step: int = 0, known_id: str | None = None
) -> Tracker:
    """Open the sinks of a run that goes on after `step`; `known_id` is its id with W&B."""
    usual = cfg.train.hang_timeout  # that the watchdog leaves; the other at the start and the end
    longest = max(usual, cfg.train.start_timeout)
    patience = min(PATIENCE_SECONDS, usual / 5, longest / (2 * SLOW))
    tracker = Tracker(known_id, patience)

    def open_wandb() -> WandbSink:
        sink = WandbSink(cfg.wandb, folder, step, known_id, (SLOW - 1) * patience)
        tracker.id = sink.id
        return sink

    if mode_of(cfg.wandb) != "disabled":
        tracker.add("W&B", open_wandb)
    if "tensorboard" in cfg.tracking.sinks:
        tracker.add("TensorBoard", lambda: TensorboardSink(folder, step))
    if "json" in cfg.tracking.sinks:
        tracker.add("events.jsonl", lambda: JsonSink(folder, step))
    return tracker
