"""Training, to be read from top to bottom: open the run, build the engine, step, save, evaluate.

    rows -> shards -> packs -> this loop -> checkpoints

The loss of a step is the mean over the trained tokens of all its packs, whatever rank and round
they fall to: every rank knows how many there are (the index says so), sums its own losses, and
DeepSpeed's division by ranks and rounds is taken back.

What all ranks must agree on (to stop, to give up, to skip a step) travels with that sum, before the
last backward pass of a step: no collective more, and no wait for the device.
"""

import time
from contextlib import closing
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phi3v.config import DeepSpeedConfig, RunConfig
from phi3v.data.batch import model_inputs
from phi3v.data.loader import Loader, OnePack, Step
from phi3v.data.mixture import qualified_id
from phi3v.data.packing import Position
from phi3v.errors import CheckpointError
from phi3v.evaluation.evaluate import Evaluation
from phi3v.model.sending import send
from phi3v.output import say
from phi3v.printing import print
from phi3v.training import zero
from phi3v.training.checkpoints.resuming import choose, restore
from phi3v.training.checkpoints.saving import Progress
from phi3v.training.checkpoints.store import remove, steps_saved
from phi3v.training.console import Console
from phi3v.training.faults import HISTORY, MAX_ROLLBACKS, reason_to_skip, spike_limit
from phi3v.training.metering import Meter
from phi3v.training.opening import Run, open_run
from phi3v.training.optimizer import learning_rates
from phi3v.training.profile import profiled
from phi3v.training.ranks import Ranks
from phi3v.training.results import check_diverged, stop_if
from phi3v.training.session import (
    Session,
    catch_up,
    ends_here,
    evaluate_now,
    finish,
    forget_later_steps,
    is_evaluated,
    save,
    start,
    stop_here,
    wait_until_saved,
)
from phi3v.training.stopping import StopRequests
from phi3v.training.watchdog import Watchdog


@dataclass
class Trail:
    """What the steps behind say about the next.

    losses   of the last steps that were not skipped
    skipped  where the steps are that were skipped since
    """

    losses: list[float]
    skipped: list[Position]


def train(cfg: RunConfig, ds: DeepSpeedConfig, ranks: Ranks, stop: StopRequests) -> None:
    """Train to the end, going on where an unfinished run stopped; all ranks call.

    Raises: ConfigError, ShardError or CheckpointError before the first step if anything does not
    fit together; Stopped after saving if it was asked to stop; Diverged on the first rank, when
    everything is written, if the loss ended far above where it began.
    """
    run = open_run(cfg, ds, ranks)
    if _is_finished(run):
        if ranks.is_first:
            print(describe_finished(run))
            check_diverged(run.folder)
        return
    stop.watch(run.folder.path, cfg.train.stop_after)
    timeouts = cfg.train.hang_timeout, max(cfg.train.hang_timeout, cfg.train.start_timeout)
    zero.start_process_group(timeouts[1])
    lock = zero.first_rank_does(run.folder.lock, ranks.is_first)
    dog = Watchdog(timeouts[0], run.folder.path, ranks.rank, timeouts[1], zero.set_timeouts)
    with closing(dog) as watchdog:
        session, done = start(run, stop, watchdog)
        evaluation = catch_up(session, done)
        if not ends_here(session, done):
            done, evaluation = run_steps(session, done)
        finish(session, done, evaluation)
        with watchdog.patience():  # the service that is told may be slow
            session.tracker.finish()
            if ranks.is_first:
                stop.clear_file()  # it came too late
            zero.leave_together()
    if lock:
        lock.close()
        check_diverged(run.folder)


def run_steps(session: Session, done: Progress) -> tuple[Progress, Evaluation | None]:
    """Train until the last step, going back where too many steps in a row are bad.

    returns  where it ended, and the evaluation by which it did, if `train.stop_if` was why
    """
    while True:
        trail, left_out = shared_trail(session.run)
        done, evaluation = run_until_bad(session, done, trail, left_out)
        if evaluation or len(trail.skipped) < session.run.cfg.faults.rollback_after:
            return done, evaluation
        done = go_back(session, done, trail)


def shared_trail(run: Run) -> tuple[Trail, list[Position]]:
    """What the first rank reads of the steps so far, on all ranks, as plain values between them."""
    trail, left_out = read_trail(run)
    places = [astuple(at) for at in trail.skipped], [astuple(at) for at in left_out]
    own: Any = [trail.losses, *places]
    losses, skipped, out = zero.from_first_rank(own)
    return Trail(losses, [Position(*at) for at in skipped]), [Position(*at) for at in out]


def read_trail(run: Run) -> tuple[Trail, list[Position]]:
    """What the run folder says of the steps so far, and the positions that are left out."""
    if not run.ranks.is_first:
        return Trail([], []), []
    good = [line for line in run.folder.read_metrics() if not line.get("skipped")]
    last_good = good[-1]["step"] if good else 0
    left_out = run.folder.faults.left_out()
    recent = [f for f in run.folder.faults.read() if f.get("step", 0) > last_good]
    skipped = [at for fault in recent if (at := Position(**fault["at"])) not in left_out]
    return Trail([line["loss"] for line in good[-HISTORY:]], skipped), left_out


def run_until_bad(
    session: Session, done: Progress, trail: Trail, left_out: list[Position]
) -> tuple[Progress, Evaluation | None]:
    """Train until the last step or until too many are skipped; save, evaluate, stop on the way."""
    run, engine = session.run, session.engine
    cfg, ranks = run.cfg, run.ranks
    plan = OnePack(run.plan) if cfg.debug.overfit_one_pack else run.plan
    loader = Loader(run.dataset, plan, ranks.rank, ranks.world_size, run.device)
    meter = Meter(run.dataset, engine.module.config, cfg, run.ds, ranks.world_size, run.device)
    steps = loader.steps(done.position, cfg.train.epochs, frozenset(left_out))
    console = Console(run.total_steps, done.step, ranks.is_first)
    evaluation: Evaluation | None = None
    while done.step < run.total_steps and len(trail.skipped) < cfg.faults.rollback_after:
        began = time.perf_counter()
        step = next(steps, None)
        if step is None:  # an epoch has fewer steps where some are left out
            break
        number = done.step + 1
        rates = learning_rates(number, run.total_steps, cfg)
        limit = spike_limit(trail.losses, cfg.faults.spike)
        with profiled(run.folder.profile, number, cfg.debug.profile_steps, ranks.rank):
            result = train_step(run, engine, loader, step, rates, limit, wishes(session))
        session.watchdog.beat()
        session.watchdog.settle()
        reason = reason_to_skip(result.loss, result.norm, limit)
        metrics: dict[str, Any] = {"step": number, "epoch": step.at.epoch, "at": asdict(step.at)}
        metrics["ranks"] = ranks.world_size
        metrics |= {"loss": _finite(result.loss), "grad_norm": _finite(result.norm)}
        metrics |= {"grad_norms": {name: _finite(norm) for name, norm in result.norms.items()}}
        metrics["lr"] = rates
        metrics |= meter.measure(step, time.perf_counter() - began) | {"skipped": reason}
        done = Progress(number, step.after)
        note(session, metrics, step)
        console.step(metrics)
        if reason:
            trail.skipped.append(step.at)
        else:
            trail.losses.append(result.loss)
            del trail.losses[:-HISTORY]
            trail.skipped.clear()
        evaluation = after_step(session, done, result, is_good=reason is None)
        if evaluation:
            break
    steps.close()
    console.close()
    return done, evaluation


@dataclass(frozen=True)
class StepResult:
    """The mean loss over a step's trained tokens, its gradient's norm, what the ranks wish.

    norms  of the gradient of each trained module
    """

    loss: float
    norm: float
    norms: dict[str, float]
    is_stopping: bool = False
    has_failed: bool = False


def wishes(session: Session) -> tuple[bool, bool]:
    """Whether this rank was asked to stop, and whether it could not write a checkpoint."""
    is_stopping = session.stop.reason() is not None
    return is_stopping, session.saver.writer.error is not None


def train_step(
    run: Run,
    engine: Any,
    loader: Loader,
    step: Step,
    rates: dict[Any, float],
    limit: float = float("inf"),
    wishes: tuple[bool, bool] = (False, False),
) -> StepResult:
    """One optimizer step; without effect on the weights if its loss is not finite or over `limit`.

    wishes  to stop, to give up: what one rank wishes, all get to know
    """
    trained = sum(int(run.dataset.label_tokens[pack].sum()) for pack in step.packs)
    undo = run.ranks.world_size * run.ds.accumulation  # what DeepSpeed will divide by
    zero.set_learning_rates(engine, rates)
    sums = send(torch.tensor([0.0, *wishes], dtype=torch.float64), run.device)
    for number, batch in enumerate(loader.on_device(step.batches), 1):
        loss = engine(**model_inputs(batch, run.dataset.view_settings, run.device))
        sums[0] += loss.detach().double()
        if number == len(step.batches):
            zero.sum_over_ranks(sums)
            loss = loss * _effect(sums[0] / max(1, trained), limit)
        engine.backward(loss * (undo / max(1, trained)))
        engine.step()
    total, stopping, failed = sums.tolist()
    norm, norms = zero.gradient_norms(engine)
    return StepResult(total / max(1, trained), norm, norms, bool(stopping), bool(failed))


def _effect(loss: Tensor, limit: float) -> Tensor:
    """One; NaN for a loss that must not move the weights: DeepSpeed skips such a gradient."""
    is_good = (loss <= limit) & loss.isfinite()
    return torch.where(is_good, 1.0, float("nan")).float()


def note(session: Session, metrics: dict[str, Any], step: Step) -> None:
    """Write a step down: metrics.jsonl, the sinks, and faults.jsonl if it was skipped."""
    run, number, reason = session.run, metrics["step"], metrics["skipped"]
    if not run.ranks.is_first:
        return
    if reason:
        samples = [[qualified_id(run.dataset, int(i)) for i in pack] for pack in step.packs]
        fault = {"step": number, "at": asdict(step.at), "reason": reason}
        fault |= {name: metrics[name] for name in ("loss", "grad_norm")} | {"samples": samples}
        run.folder.faults.add(fault)
        say(f"step {number} is skipped: {reason}; see faults.jsonl")
    run.folder.check_owner()
    run.folder.add_metrics(metrics)
    session.tracker.log_step(metrics)


def after_step(
    session: Session, done: Progress, result: StepResult, is_good: bool
) -> Evaluation | None:
    """Save and evaluate when it is time, and stop if a rank was asked to.

    returns  the evaluation by which `train.stop_if` ends the run

    Raises: CheckpointError on all ranks if one could not write; Stopped after saving.
    """
    run, cfg = session.run, session.run.cfg
    if result.has_failed:
        wait_until_saved(session)
    is_last = done.step == run.total_steps
    if result.is_stopping and not is_last:
        stop_here(session, done)
    if is_good and not is_last and done.step % cfg.checkpoint.every == 0:
        save(session, done)
    return evaluate_now(session, done) if is_evaluated(run, done.step) else None


def go_back(session: Session, done: Progress, trail: Trail) -> Progress:
    """Load the last checkpoint before the skipped steps, whose packs are left out from now on.

    Raises: CheckpointError if there is none, or going back has not helped before.
    """
    run, first_bad = session.run, done.step - len(trail.skipped) + 1
    wait_until_saved(session)
    beat = session.watchdog.beat
    with session.watchdog.patience():
        choice = choose(run.folder.checkpoints, run.ranks, beat, before=first_bad)
    tried = zero.from_first_rank(run.folder.faults.rollbacks_to(choice.step if choice else 0))
    if choice is None or tried >= MAX_ROLLBACKS or run.cfg.debug.overfit_one_pack:
        raise CheckpointError(
            f"steps {first_bad} to {done.step} of {run.folder.path} were skipped, and going back "
            f"{'has not helped' if tried else 'is not possible'}; {run.folder.faults.path} has "
            "their reasons and samples, look at those, or lower optim.lr in another run"
        )
    with session.watchdog.patience():
        back = restore(session.engine, choice, run.ranks)
    session.saver.saved_step = back.step
    if run.ranks.is_first:
        say(f"going back to step {back.step}, steps {first_bad} on are left out")
        for later in (s for s in steps_saved(run.folder.checkpoints) if s > back.step):
            remove(run.folder.checkpoints, later)
        run.folder.faults.add_rollback(back.step, trail.skipped)
        forget_later_steps(run, back, dict(choice.manifest))
        session.tracker.forget_after(back.step)
    return back


def describe_finished(run: Run) -> str:
    """That there is nothing left to train, and what to type for what may be meant."""
    summary = run.folder.read_summary() or {}
    steps = summary["steps"]
    line = f"{run.folder.path} is finished: {steps:,} steps"
    if summary.get("stopped_by") and steps < run.total_steps:
        line += f", stopped by train.stop_if: {summary['stopped_by']} (change that key to train on)"
    elif steps > run.total_steps:
        line += f", more than the {run.total_steps:,} that are asked for (name another run.out)"
    return f"{line}; see summary.json, or ask its model by launch/evaluate.py"


def _is_finished(run: Run) -> bool:
    summary = run.folder.read_summary() or {}
    if not summary.get("is_finished"):
        return False
    if summary.get("stopped_by") and summary["stop_if"] == stop_if(run.cfg):
        return True
    left_out = len(run.folder.faults.left_out()) if run.cfg.train.epochs else 0
    return bool(summary["steps"] >= run.total_steps - left_out)


def _finite(value: float) -> float | None:
    """None for what JSON cannot say."""
    return value if np.isfinite(value) else None
