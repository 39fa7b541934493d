"""What a run tells people while it trains: W&B, TensorBoard, a file of JSON lines.

    check_sinks(cfg)                                     # before anything slow starts
    tracker = open_tracker(cfg, folder, step, known_id)
    tracker.log_step(line_of_metrics)

`tracker` says what is told and when, `sinks` what a sink must be able to do; each sink is a module.
"""

from phi3v.training.tracking.opening import check_sinks, open_tracker
from phi3v.training.tracking.tracker import Tracker

__all__ = ["Tracker", "check_sinks", "open_tracker"]
