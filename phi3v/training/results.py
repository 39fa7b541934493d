"""What a run leaves for people: summary.json, predictions.jsonl, report.html."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from phi3v.config import RunConfig
from phi3v.errors import CheckpointError, Diverged
from phi3v.evaluation.evaluate import Evaluation
from phi3v.evaluation.report import Report, Saved, write_report
from phi3v.lines import write_lines
from phi3v.output import say
from phi3v.stored import read_object
from phi3v.training import console
from phi3v.training.checkpoints.store import (
    BEST,
    LATEST,
    read_manifest,
    read_pointer,
    step_name,
    steps_saved,
)
from phi3v.training.run_folder import (
    CONFIG,
    DATA,
    DEEPSPEED,
    ENVIRONMENT,
    PREDICTIONS,
    REPORT,
    TOTALLED,
    RunFolder,
)
from phi3v.training.stop_if import goodness, value_of

# A loss that does not fall stays near that of the first step, which the weights as they were gave.
LAST_STEPS = 20  # that tell where a run ended; of a short run the last half
NEEDED = 4  # steps, before anything can be said
ABOVE = 0.5  # of the first loss, by which a loss is far above it
AT_LEAST = 0.1  # nats, likewise: 0.02 after 0.01 is no divergence
SHARE = 0.9  # of the last losses that are far above: where batches differ much, some are


def write_results(
    folder: RunFolder,
    cfg: RunConfig,
    evaluation: Evaluation | None,
    step: int,
    is_finished: bool,
    stopped_by: str | None = None,
) -> str | None:
    """Write summary, answers and report of a run as it stands, and say what was found.

    stopped_by  why `train.stop_if` ended it before its last step

    Returns how the run diverged, None if it did not.
    """
    steps = folder.read_metrics(TOTALLED)
    diverged = divergence(steps)
    summary = {
        "is_finished": is_finished,
        "diverged": diverged,
        "stopped_by": stopped_by,
        "stop_if": stop_if(cfg) if stopped_by else None,
        "steps": step,
        "totals": totals(steps),
        "throughput": throughput(steps),
        "paths": {"report": str(folder.path / REPORT), "checkpoints": str(folder.checkpoints)},
        "evaluation_loss": evaluation.loss if evaluation else None,
        "metrics": evaluation.metrics() if evaluation else {},
    }
    if evaluation:
        write_lines(folder.path / PREDICTIONS, map(asdict, evaluation.outcomes))
        say(console.describe_evaluation(step, evaluation.loss, evaluation.metrics()))
    data = read_object(folder.path / DATA)
    report = Report(
        title=folder.path.name,
        steps=steps,
        summary=summary,
        epochs=epochs(cfg, data, sum(step["samples"] for step in steps)),
        evaluations=folder.read_evaluations(),
        examples=evaluation.examples() if evaluation else (),
        data=data.get("datasets", ()),
        checkpoints=saved(folder),
        faults=folder.faults.read(),
        facts=facts(folder, cfg),
        files={name: (folder.path / name).read_text("utf-8") for name in (CONFIG, DEEPSPEED)},
    )
    write_report(folder.path / REPORT, report)
    folder.write_summary(summary)  # last: it may say that the run is finished
    return diverged


def divergence(steps: Sequence[Mapping[str, Any]]) -> str | None:
    """How far the loss ended above where it began, in words; None if it did not diverge.

    steps  lines of metrics.jsonl

    The loss of the first step is that of the weights as they were. A run has diverged if SHARE of
    its last LAST_STEPS losses are above it by half of it, and by AT_LEAST.
    """
    losses = np.array([step["loss"] for step in steps if not step.get("skipped")], dtype=float)
    losses = losses[np.isfinite(losses)]
    if len(losses) < NEEDED:
        return None
    last = losses[-min(LAST_STEPS, len(losses) // 2) :]
    first, end = float(losses[0]), float(np.median(last))
    if np.mean(last > first + max(ABOVE * abs(first), AT_LEAST)) < SHARE:
        return None
    return f"the loss was {first:.3f} at first, and {end:.3f} over the last {len(last)} steps"


def check_diverged(folder: RunFolder) -> None:
    """Refuse to call a run finished, once all is written, whose loss rose.

    Raises: Diverged
    """
    found = (folder.read_summary() or {}).get("diverged")
    if found:
        raise Diverged(
            f"{folder.path} diverged: {found}; its weights are worse than those it started from. "
            "Lower optim.lr, or warm up longer (optim.warmup_ratio), in another run.out; see "
            f"{folder.path / REPORT}"
        )


def saved(folder: RunFolder) -> list[Saved]:
    """The checkpoints of a run, oldest first; one that is removed meanwhile is left out."""
    checkpoints = folder.checkpoints
    pointers = {mark: read_pointer(checkpoints, mark) for mark in (LATEST, BEST)}
    found = []
    for step in steps_saved(checkpoints):
        name = step_name(step)
        marks = tuple(mark for mark, pointed in pointers.items() if pointed == name)
        try:
            manifest = read_manifest(checkpoints / name)
        except CheckpointError:
            if (checkpoints / name).is_dir():
                found.append(Saved(step, "", 0, (*marks, "damaged")))
            continue
        size = sum(file["bytes"] for file in manifest["files"].values())
        found.append(Saved(step, manifest["saved_at"][:19].replace("T", " "), size, marks))
    return found


def best_scores(entries: Sequence[Mapping[str, Any]], best: str | None) -> dict[int, float]:
    """How good the evaluated steps are by `checkpoint.best`, higher is better; none without it.

    entries  lines of evaluations.jsonl; that of step 0 is of the base, which is no checkpoint
    """
    if best is None:
        return {}
    found = {e["step"]: value_of(e, best) for e in entries if e["step"]}
    return {step: goodness(best, value) for step, value in found.items() if value is not None}


def stop_if(cfg: RunConfig) -> dict[str, Any] | None:
    """The key train.stop_if as summary.json has it."""
    return None if cfg.train.stop_if is None else asdict(cfg.train.stop_if)


def totals(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the steps add up to."""
    names = ("samples", "tokens", "label_tokens", "views", "flops", "step_seconds")
    return {name: sum(step[name] for step in steps) for name in names}


def epochs(cfg: RunConfig, data: Mapping[str, Any], samples: int) -> float | None:
    """How often a run that trained so many samples went over its data; None where unknown.

    data  content of data.json; an epoch holds the samples of a folder of weight 2 twice
    """
    if cfg.debug.overfit_one_pack:
        return None
    sizes = [folder["splits"]["train"]["samples"] for folder in data.get("datasets", ())]
    if len(sizes) != len(cfg.data.parts):  # a run begun before data.json told them
        return None
    return samples / sum(n * part.weight for n, part in zip(sizes, cfg.data.parts, strict=True))


def throughput(steps: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """How fast the run was, over all its steps but the first of each process, which compiles.

    steps    lines of metrics.jsonl, so restarts make no difference
    returns  counts and `seconds` of the steps that count, `warmup_steps` those left out; rates over
             all ranks; `mfu`, `packing`, `balance` and `data_wait` as shares of 1; `memory_gb` the
             largest of all steps; None where there is nothing to tell

    A second is one in a step: saving and evaluation are outside.
    """
    counted = [step for step in steps if not step.get("is_warmup")]  # older lines have no mark
    sums = {
        name: sum(step[name] for step in counted)
        for name in ("samples", "tokens", "views", "step_seconds", "data_wait_seconds")
    }

    def rate(name: str) -> float | None:
        return sums[name] / sums["step_seconds"] if sums["step_seconds"] else None

    def mean(name: str, weight: str | None = None) -> float | None:
        values = [step[name] for step in counted]
        weights = [step[weight] for step in counted] if weight and sums[weight] else None
        return None if not values or None in values else float(np.average(values, weights=weights))

    return {
        "warmup_steps": len(steps) - len(counted),
        "steps": len(counted),
        "samples": sums["samples"],
        "tokens": sums["tokens"],
        "seconds": sums["step_seconds"],
        "tokens_per_second": rate("tokens"),
        "views_per_second": rate("views"),
        "mfu": mean("mfu", weight="step_seconds"),  # all FLOPs over all seconds
        "packing": mean("packing"),  # every step has the same budget
        "balance": mean("balance", weight="step_seconds"),  # work over work and waiting
        "data_wait": rate("data_wait_seconds"),
        "memory_gb": max((step["memory_gb"] for step in steps), default=None),
    }


def facts(folder: RunFolder, cfg: RunConfig) -> dict[str, str]:
    """The settings that a reader of the report asks for first."""
    environment, data, ds = (
        read_object(folder.path / name) for name in (ENVIRONMENT, DATA, DEEPSPEED)
    )
    parts = cfg.data.parts
    is_bf16 = (ds.get("bf16") or {}).get("enabled", False)
    rates = ", ".join(f"{module} {cfg.optim.peak_lr(module):g}" for module in cfg.model.trained)
    only = ", of which the first pack alone is trained on" if cfg.debug.overfit_one_pack else ""
    shards = ", ".join(p.path if p.weight == 1 else f"{p.path} x {p.weight:g}" for p in parts)
    return {
        "model": cfg.model.path,
        "frozen": ", ".join(cfg.model.freeze) or "nothing",
        "shards": f"{shards} ({data['samples']:,} samples, {data['fingerprint'][:12]}){only}",
        "batch": f"{ds['train_batch_size']} packs, {'bfloat16' if is_bf16 else 'float32'}",
        "pack": f"{cfg.data.max_tokens:,} tokens, {cfg.data.max_views} views at most",
        "peak learning rate": f"{rates or 'none'}; {cfg.optim.schedule}",
        "device of the last start": f"{environment['ranks']} x {environment['device']}",
        "deepspeed": environment["versions"]["deepspeed"] or "",
        "commit": (environment["commit"] or "unknown")[:12],
    }
