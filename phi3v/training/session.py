"""One start of a run: its engine, what listens beside it, how it saves, evaluates and stops."""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from phi3v.config import to_dict
from phi3v.data.mixture import open_datasets
from phi3v.errors import CheckpointError, ConfigError, Stopped
from phi3v.evaluation.evaluate import Evaluation, Interrupted, evaluate
from phi3v.evaluation.generation import Generator
from phi3v.model import Phi3VForCausalLM
from phi3v.training import zero
from phi3v.training.checkpoints.resuming import Choice, choose, restore
from phi3v.training.checkpoints.saving import Progress, Saver
from phi3v.training.checkpoints.store import BEST, LATEST, read_pointer
from phi3v.training.console import say
from phi3v.training.meeting import Turn
from phi3v.training.opening import Run, describe_data, describe_length, dtype_of, load_model
from phi3v.training.optimizer import parameter_groups
from phi3v.training.results import best_scores, write_results
from phi3v.training.run_folder import CONFIG, DATA, DEEPSPEED, ENVIRONMENT, REPORT
from phi3v.training.stopping import StopRequests
from phi3v.training.tracking import Tracker, open_tracker
from phi3v.training.tracking.sinks import Histogram
from phi3v.training.watchdog import Watchdog


@dataclass(frozen=True)
class Session:
    """What one start of a run works with."""

    run: Run
    engine: Any
    saver: Saver
    tracker: Tracker
    stop: StopRequests
    watchdog: Watchdog


def start(run: Run, stop: StopRequests, watchdog: Watchdog) -> tuple[Session, Progress]:
    """Build the engine, and load the newest whole checkpoint if there is one."""
    cfg, ranks, folder = run.cfg, run.ranks, run.folder
    if cfg.debug.deterministic:
        torch.use_deterministic_algorithms(True)
    random.seed(cfg.run.seed)
    np.random.seed(cfg.run.seed)
    torch.manual_seed(cfg.run.seed)
    choice = choose(folder.checkpoints, ranks, watchdog.beat)
    check_length(run, choice.step if choice else 0)
    before = dict(choice.manifest) if choice else {}
    check_data(run, before)
    watchdog.beat()
    model = load_model(cfg, run.ds)
    model.set_execution(run.execution)
    engine = zero.build_engine(model, parameter_groups(model, cfg), run.ds)
    zero.set_timeouts(watchdog.limit)  # DeepSpeed has made groups of its own
    watchdog.beat()
    done = restore(engine, choice, ranks)
    if ranks.is_first:
        tell_start(run, done.step)
        print(run.execution, file=sys.stderr)
        data = describe_data(run.dataset)
        folder.write_origin(cfg, run.ds, data, ranks.world_size, asdict(run.execution))
        forget_later_steps(run, done, before)
    tracker = start_tracker(run, done.step, before.get("wandb_id"))
    saver = open_saver(run, engine, choice, watchdog.beat)
    watchdog.beat()
    return Session(run, engine, saver, tracker, stop, watchdog), done


def open_saver(run: Run, engine: Any, choice: Choice | None, beat: Callable[[], None]) -> Saver:
    """What saves the run: it knows what is saved already, and how good the steps before were."""
    cfg = run.cfg.checkpoint
    saver = Saver(
        engine,
        run.folder.checkpoints,
        cfg,
        run.ranks,
        run.facts(),
        device=run.device,
        offloaded=run.ds.offloads_optimizer,
        beat=beat,
    )
    saver.saved_step = choice.step if choice else None
    saver.scores.update(best_scores(run.folder.read_evaluations(), cfg.best))
    return saver


def check_length(run: Run, done: int) -> None:
    """Refuse to shorten a run to fewer steps than it has done.

    Raises: ConfigError naming both.
    """
    if done > run.total_steps:
        asked = "train.max_steps" if run.cfg.train.epochs is None else "train.epochs"
        raise ConfigError(
            f"{run.folder.path} has done {done:,} steps, {asked} asks for {run.total_steps:,}; "
            f"raise it, or name another run.out for a shorter run"
        )


def tell_start(run: Run, done: int) -> None:
    """Say how long the run is, and with which step a start of it before goes on."""
    say(describe_length(run))
    if not (run.folder.path / CONFIG).is_file():
        return
    if done == run.total_steps:
        say(f"{run.folder.path} goes on after its last step, {done:,}: with its evaluation")
    else:
        why = f"after step {done:,}" if done else "for it has no checkpoint"
        say(f"{run.folder.path} goes on with step {done + 1:,} of {run.total_steps:,}, {why}")


def check_data(run: Run, manifest: dict[str, Any]) -> None:
    """Refuse to go on with other data than the checkpoint was trained on.

    Raises: CheckpointError
    """
    before = manifest.get("fingerprints", {}).get("data", run.dataset.fingerprint)
    if before != run.dataset.fingerprint:
        raise CheckpointError(
            f"{run.folder.path} was trained on data with fingerprint {before[:12]}, "
            f"{', '.join(run.cfg.data.folders)} now has {run.dataset.fingerprint[:12]}; "
            "take the data of before, or name another run.out"
        )


def forget_later_steps(run: Run, done: Progress, manifest: dict[str, Any]) -> None:
    """Drop the records of steps that are about to be repeated."""
    run.folder.cut_metrics(manifest.get("metrics_bytes", 0))
    run.folder.faults.keep(done.step)


def start_tracker(run: Run, step: int, known_id: str | None) -> Tracker:
    """Open the first rank's sinks, and tell them what the run is made of and what they miss."""
    if not run.ranks.is_first:
        return Tracker(known_id)
    tracker = open_tracker(run.cfg, run.folder.path, step, known_id)
    tracker.log_config(step, describe_origin(run))
    tracker.log_data(lambda: describe_lengths(run))
    tracker.log_again(run.folder.read_metrics, run.folder.read_evaluations)
    return tracker


def describe_origin(run: Run) -> dict[str, Any]:
    """The recipe, and under names of their own the other files that `write_origin` wrote."""

    def read(name: str) -> Any:
        return json.loads((run.folder.path / name).read_text(encoding="utf-8"))

    origin = {"deepspeed_json": read(DEEPSPEED), "environment": read(ENVIRONMENT)}
    return {**to_dict(run.cfg), **origin, "dataset": read(DATA)}


def describe_lengths(run: Run) -> dict[str, Histogram]:
    """How many tokens and views samples have, those that are trained on and those held out."""
    parts: dict[str, Any] = {"train": run.dataset}
    if run.cfg.eval.rows:
        split = run.cfg.eval.split
        parts[split] = open_datasets(run.cfg.data.folders, split, is_optional=True)
    return {
        f"{split}_{name}": Histogram.of(values)
        for split, part in parts.items()
        for name, values in (("tokens_per_sample", part.tokens), ("views_per_sample", part.views))
    }


def save(session: Session, done: Progress) -> None:
    """Save the run; training goes on while it is written."""
    folder, is_first = session.run.folder, session.run.ranks.is_first
    if session.saver.saved_step != done.step:
        size = folder.metrics_bytes if is_first else 0
        with session.watchdog.patience():  # the checkpoint before may still be on its way
            session.saver.save(done, metrics_bytes=size, wandb_id=session.tracker.id)


def wait_until_saved(session: Session) -> None:
    """Wait until what was saved is on disk, however slow that is; all ranks call.

    Raises: CheckpointError on all ranks if one could not write.
    """
    with session.watchdog.patience():
        session.saver.wait()


def stop_here(session: Session, done: Progress) -> None:
    """Save, and end the run on all ranks together.

    Raises: Stopped
    """
    save(session, done)
    wait_until_saved(session)
    run = session.run
    reason = session.stop.reason() or "a signal to another rank"
    with session.watchdog.patience():
        session.tracker.finish()
        if run.ranks.is_first:
            session.stop.clear_file()
        zero.leave_together()
    raise Stopped(
        f"stopped by {reason} after step {done.step} of {run.total_steps}, which is saved in "
        f"{run.folder.checkpoints}; the same command goes on"
    )


def run_evaluation(session: Session) -> Evaluation | None:
    """Gather the weights into a whole model on every rank, and share the held-out rows out.

    None if a rank was asked to stop on the way.
    """
    run, engine, cfg = session.run, session.engine, session.run.cfg
    with torch.device("meta"):
        whole = Phi3VForCausalLM(engine.module.config).to(dtype_of(run.ds))
    whole = whole.to_empty(device=run.device)
    zero.copy_weights(engine.module, whole)
    turn = Turn("evaluation", run.ranks.world_size)

    def tick() -> None:
        session.watchdog.beat()
        turn.move()
        if session.stop.reason() is not None:
            raise Interrupted

    tokenizer = PreTrainedTokenizerFast.from_pretrained(cfg.model.path)
    generator = Generator(
        whole.eval(),
        tokenizer,
        run.dataset.view_settings,
        cfg.eval.max_new_tokens,
        cfg.eval.batch_rows,
        tick,
    )

    def gather(share: Any) -> list[Any]:
        turn.wait(session.watchdog.beat)  # for ranks whose answers are longer
        return zero.gather_objects(share)

    place = run.ranks.rank, run.ranks.world_size
    try:
        return evaluate(generator, cfg.data.folders, cfg.eval, *place, gather)
    except Interrupted:
        return None


def finish(session: Session, done: Progress) -> None:
    """Save the last checkpoint, evaluate, and write summary and report.

    Raises: Stopped if a rank was asked to stop before the evaluation was done.
    """
    save(session, done)
    evaluation = run_evaluation(session) if session.run.cfg.eval.rows else None
    if session.run.cfg.eval.rows and evaluation is None:
        stop_here(session, done)
    wait_until_saved(session)
    report(session, evaluation, done, is_finished=True)
    log_checkpoint(session, done)


def log_checkpoint(session: Session, done: Progress) -> None:
    """Tell the sinks of the checkpoint that the recipe asks for, if it asks."""
    run, which = session.run, session.run.cfg.wandb.log_checkpoint
    if not run.ranks.is_first or which == "none":
        return
    name = read_pointer(run.folder.checkpoints, LATEST if which == "last" else BEST)
    if name is None:  # no evaluation gave a number
        say(f"no checkpoint in {run.folder.checkpoints} is the best, so none is an artifact")
        return
    session.tracker.log_checkpoint(done.step, run.folder.checkpoints / name, (which, name))


def report(
    session: Session, evaluation: Evaluation | None, done: Progress, is_finished: bool
) -> None:
    """Tell what was found: evaluations.jsonl, sinks, summary.json, predictions, report.html."""
    run = session.run
    if not run.ranks.is_first:
        return
    if evaluation:
        entry = run.folder.add_evaluation(
            done.step,
            loss=evaluation.loss,
            loss_rows=evaluation.loss_rows,
            split=run.cfg.eval.split,
            unanswered=evaluation.unanswered,
            metrics=evaluation.metrics(),
        )
        session.saver.scores.update(best_scores([entry], run.cfg.checkpoint.best))
        found = evaluation.loss, evaluation.metrics(), evaluation.examples()
        session.tracker.log_evaluation(done.step, *found)
    if is_finished:
        session.saver.tidy()  # before the report, which lists what is kept
    diverged = write_results(run.folder, run.cfg, evaluation, done.step, is_finished)
    if is_finished:
        how = f"diverged ({diverged})" if diverged else "finished"
        say(f"{how} after step {done.step}, see {run.folder.path / REPORT}")
