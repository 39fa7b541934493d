"""One start of a run: its engine, what listens beside it, how it saves, evaluates and stops."""

import random
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from phi3v.errors import CheckpointError, Stopped
from phi3v.evaluation.evaluate import Evaluation, Interrupted, evaluate
from phi3v.evaluation.generation import Generator
from phi3v.model import Phi3VForCausalLM
from phi3v.training import zero
from phi3v.training.checkpoints.resuming import choose, restore
from phi3v.training.checkpoints.saving import Progress, Saver
from phi3v.training.opening import Run, describe_data, dtype_of, load_model
from phi3v.training.optimizer import parameter_groups
from phi3v.training.results import best_scores, write_results
from phi3v.training.stopping import StopRequests
from phi3v.training.tracking import Tracker
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
    choice = choose(folder.checkpoints, ranks)
    before = dict(choice.manifest) if choice else {}
    check_data(run, before)
    watchdog.beat()
    model = load_model(cfg, run.ds)
    model.set_execution(run.execution)
    engine = zero.build_engine(model, parameter_groups(model, cfg), run.ds)
    watchdog.beat()
    done = restore(engine, choice, ranks)
    if ranks.is_first:
        print(run.execution, file=sys.stderr)
        data = describe_data(run.dataset)
        folder.write_origin(cfg, run.ds, data, ranks.world_size, asdict(run.execution))
        forget_later_steps(run, done, before)
    tracker = Tracker(cfg, folder.path, ranks.is_first, before.get("wandb_id"))
    tracker.log_again(folder.read_metrics)
    saver = Saver(engine, folder.checkpoints, cfg.checkpoint, ranks, run.facts())
    saver.scores.update(best_scores(folder.read_evaluations(), cfg.checkpoint.best))
    watchdog.beat()
    return Session(run, engine, saver, tracker, stop, watchdog), done


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


def save(session: Session, done: Progress) -> None:
    """Save the run; training goes on while it is written."""
    folder, is_first = session.run.folder, session.run.ranks.is_first
    if session.saver.saved_step != done.step:
        size = folder.metrics_bytes if is_first else 0
        session.saver.save(done, metrics_bytes=size, wandb_id=session.tracker.id)
    session.watchdog.beat()


def stop_here(session: Session, done: Progress) -> None:
    """Save, and end the run on all ranks together.

    Raises: Stopped
    """
    save(session, done)
    session.saver.wait()
    session.tracker.finish()
    run = session.run
    reason = session.stop.reason() or "a signal to another rank"
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

    def tick() -> None:
        session.watchdog.beat()
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
    place = run.ranks.rank, run.ranks.world_size
    try:
        return evaluate(generator, cfg.data.folders, cfg.eval, *place, zero.gather_objects)
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
    session.saver.wait()
    report(session, evaluation, done, is_finished=True)
    session.saver.tidy()


def report(
    session: Session, evaluation: Evaluation | None, done: Progress, is_finished: bool
) -> None:
    """Tell what was found: W&B, evaluations.jsonl, summary.json, predictions.jsonl, report.html."""
    run = session.run
    if not run.ranks.is_first:
        return
    if evaluation:
        entry = run.folder.add_evaluation(done.step, evaluation.loss, evaluation.metrics())
        session.saver.scores.update(best_scores([entry], run.cfg.checkpoint.best))
        scores = {name: score.value for name, score in evaluation.scores.items()}
        values = {"eval": {"loss": evaluation.loss, **scores}}
        session.tracker.log_evaluation(done.step, values, evaluation.examples())
    write_results(run.folder, run.cfg, evaluation, done.step, is_finished)
