"""What a run leaves for people: summary.json, predictions.jsonl, report.html."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from phi3v.config import RunConfig
from phi3v.evaluation.evaluate import Evaluation
from phi3v.evaluation.report import write_report
from phi3v.files import write_text
from phi3v.training.run_folder import REPORT, RunFolder

PREDICTIONS = "predictions.jsonl"


def write_results(
    folder: RunFolder, cfg: RunConfig, evaluation: Evaluation | None, step: int, is_finished: bool
) -> None:
    """Write summary, answers and report of a run as it stands."""
    steps = folder.read_metrics()
    summary = {
        "is_finished": is_finished,
        "steps": step,
        "totals": totals(steps),
        "paths": {"report": str(folder.path / REPORT), "checkpoints": str(folder.checkpoints)},
        "evaluation_loss": evaluation.loss if evaluation else None,
        "metrics": {n: s.as_dict() for n, s in evaluation.scores.items()} if evaluation else {},
    }
    if evaluation:
        lines = [json.dumps(asdict(o), ensure_ascii=False) for o in evaluation.outcomes]
        write_text(folder.path / PREDICTIONS, "".join(line + "\n" for line in lines))
    examples = evaluation.examples() if evaluation else []
    path = folder.path / REPORT
    write_report(path, folder.path.name, steps, summary, examples, facts(folder, cfg))
    folder.write_summary(summary)


def totals(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the steps add up to."""
    names = ("samples", "tokens", "label_tokens", "views", "flops", "step_seconds")
    return {name: sum(step[name] for step in steps) for name in names}


def facts(folder: RunFolder, cfg: RunConfig) -> dict[str, str]:
    """The settings that a reader of the report asks for first."""
    environment = json.loads((folder.path / "environment.json").read_text(encoding="utf-8"))
    data = json.loads((folder.path / "data.json").read_text(encoding="utf-8"))
    return {
        "model": cfg.model.path,
        "shards": f"{cfg.data.shards} ({data['samples']:,} samples, {data['fingerprint'][:12]})",
        "pack": f"{cfg.data.max_tokens:,} tokens, {cfg.data.max_views} views at most",
        "learning rate": f"{cfg.optim.lr:g}, {cfg.optim.schedule}",
        "device": f"{environment['ranks']} x {environment['device']}",
        "deepspeed": environment["versions"]["deepspeed"] or "",
        "commit": (environment["commit"] or "unknown")[:12],
    }
