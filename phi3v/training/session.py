"""One start of a run: its engine, what listens beside it, how it saves, evaluates and stops."""

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from phi3v.config import RunConfig, to_dict
from phi3v.data.mixture import open_datasets
from phi3v.data.verification import check_files, listed_files
from phi3v.errors import CheckpointError, ConfigError, Stopped
from phi3v.evaluation.evaluate import Evaluation, Interrupted, evaluate
from phi3v.evaluation.generation import Generator
from phi3v.model import Phi3VForCausalLM
from phi3v.output import say
from phi3v.progress import progress
from phi3v.stored import read_object
from phi3v.training import zero
from phi3v.training.checkpoints.resuming import Choice, choose, restore
from phi3v.training.checkpoints.saving import Progress, Saver
from phi3v.training.checkpoints.store import BEST, LATEST, read_pointer
from phi3v.training.meeting import Turn
from phi3v.training.opening import Run, describe_data, describe_length, dtype_of, load_model
from phi3v.training.optimizer import parameter_groups
from phi3v.training.results import best_scores, write_results
from phi3v.training.run_folder import CONFIG, DATA, DEEPSPEED, ENVIRONMENT, REPORT, TOTALLED
from phi3v.training.stop_if import reason_to_end
from phi3v.training.stopping import StopRequests
from phi3v.training.tracking import Tracker, open_tracker
from phi3v.training.tracking.sinks import Histogram
from phi3v.training.watchdog import Watchdog

MOVE_SECONDS = 1.0  # between two signs of life to the ranks that are done with their share


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
    seed(cfg)
    check_shards(run, watchdog.beat)
    choice = choose(folder.checkpoints, ranks, watchdog.beat)
    check_length(run, choice.step if choice else 0)
    before = dict(choice.manifest) if choice else {}
    check_data(run, before)
    watchdog.beat()
    engine = build(run)
    zero.set_timeouts(watchdog.limit)  # DeepSpeed has made groups of its own
    watchdog.beat()
    done = restore(engine, choice, ranks)
    if ranks.is_first:
        tell_start(run, done.step)
        say(str(run.execution))
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


def seed(cfg: RunConfig) -> None:
    """Have everything random in this process follow from the run's seed."""
    if cfg.debug.deterministic:
        torch.use_deterministic_algorithms(True)
    random.seed(cfg.run.seed)
    np.random.seed(cfg.run.seed)
    torch.manual_seed(cfg.run.seed)


def build(run: Run) -> Any:
    """The engine of a run, with the base model's weights; all ranks call."""
    model = load_model(run.cfg, run.ds)
    model.set_execution(run.execution)
    return zero.build_engine(model, parameter_groups(model, run.cfg), run.ds)


def gathered(run: Run, engine: Any) -> Phi3VForCausalLM:
    """The engine's weights as a whole model on every rank's device; all ranks call."""
    with torch.device("meta"):
        whole = Phi3VForCausalLM(engine.module.config).to(dtype_of(run.ds))
    whole = whole.to_empty(device=run.device)
    zero.copy_weights(engine.module, whole)
    return whole


def check_shards(run: Run, beat: Callable[[], None]) -> None:
    """Compare every byte of the datasets with the manifests, if data.verify asks; all ranks call.

    The ranks of a host share its reading, for hosts may have disks of their own.
    Raises: ShardError on the rank that finds a file which is not what it should be.
    """
    if run.cfg.data.verify != "digest":
        return
    ranks = run.ranks
    files = [file for folder in run.cfg.data.folders for file in listed_files(Path(folder))]
    mine = files[ranks.local_rank :: ranks.local_size]
    total, began = sum(file.bytes for file in files), time.monotonic()
    turn, moved = Turn("check of the shards", ranks.world_size), [began]
    settings = {"unit_scale": True, "leave": False, "disable": not ranks.is_first}
    with progress(None, "check the shards", "B", sum(f.bytes for f in mine), **settings) as bar:

        def told(size: int) -> None:
            bar.update(size)
            beat()
            if time.monotonic() - moved[0] > MOVE_SECONDS:
                moved[0] = time.monotonic()
                turn.move()

        check_files(mine, told)
    turn.wait(beat)
    if ranks.is_first:
        seconds = time.monotonic() - began
        say(f"all {total:,} bytes of {len(files):,} files are as written ({seconds:,.0f} s)")


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
    run.folder.read_metrics(TOTALLED)  # at its end the run could not sum them up
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
        return read_object(run.folder.path / name)

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


def stop_here(session: Session, done: Progress) -> NoReturn:
    """Save, and end the run on all ranks together; before its first step there is nothing to save.

    Raises: Stopped
    """
    if done.step:
        save(session, done)
        wait_until_saved(session)
    run = session.run
    reason = session.stop.reason() or "a signal to another rank"
    with session.watchdog.patience():
        session.tracker.finish()
        if run.ranks.is_first:
            session.stop.clear_file()
        zero.leave_together()
    where = "before the first step"
    if done.step:
        saved = f"which is saved in {run.folder.checkpoints}"
        where = f"after step {done.step} of {run.total_steps}, {saved}"
    raise Stopped(f"stopped by {reason} {where}; the same command goes on")


def evaluate_now(session: Session, done: Progress) -> Evaluation | None:
    """Evaluate in the middle of a run, and say what was found if `train.stop_if` ends it by that.

    Raises: Stopped if a rank was asked to stop before the evaluation was done, which is then made
    when the run goes on.
    """
    evaluation = run_evaluation(session)
    if evaluation is None:
        stop_here(session, done)
    record(session, evaluation, done)
    if ends_here(session, done):
        return evaluation
    report(session, evaluation, done)
    return None


def catch_up(session: Session, done: Progress) -> Evaluation | None:
    """Make the evaluation that is due after the steps done, if it is missing; as `evaluate_now`.

    It is that of the base before the first step, or one that the end of a process came before.
    """
    run, cfg = session.run, session.run.cfg.eval
    evaluated = zero.from_first_rank([entry["step"] for entry in evaluations(run)])
    if cfg.at_start and done.step and 0 not in evaluated and run.ranks.is_first:
        say(
            f"eval.at_start comes too late for {run.folder.path}, which has done {done.step} "
            "steps: ask its base by launch/evaluate.py"
        )
    is_due = cfg.at_start if done.step == 0 else is_evaluated(run, done.step)
    return evaluate_now(session, done) if is_due and done.step not in evaluated else None


def is_evaluated(run: Run, step: int) -> bool:
    """Whether the run is evaluated after a step that is not its last."""
    cfg = run.cfg.eval
    return bool(cfg.rows and cfg.every) and step % cfg.every == 0 and step < run.total_steps


def ends_here(session: Session, done: Progress) -> bool:
    """Whether `train.stop_if` ends the run after the steps done; all ranks call."""
    if session.run.cfg.train.stop_if is None:
        return False
    return zero.from_first_rank(reason_to_end_of(session.run, done) is not None)


def reason_to_end_of(run: Run, done: Progress) -> str | None:
    """Why `train.stop_if` ends a run after the steps done, by its evaluations so far."""
    if done.step == run.total_steps:
        return None
    return reason_to_end(evaluations(run), run.cfg.train.stop_if, done.step)


def evaluations(run: Run) -> list[dict[str, Any]]:
    """The lines of evaluations.jsonl; none on another rank than the first, which writes it."""
    return run.folder.read_evaluations() if run.ranks.is_first else []


def run_evaluation(session: Session) -> Evaluation | None:
    """Gather the weights into a whole model on every rank, and share the held-out rows out.

    None if a rank was asked to stop on the way.
    """
    run, cfg = session.run, session.run.cfg
    whole = gathered(run, session.engine)
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


def finish(session: Session, done: Progress, evaluation: Evaluation | None = None) -> None:
    """Save the last checkpoint, evaluate, and write summary and report.

    evaluation  of the last step, if it was made already

    Raises: Stopped if a rank was asked to stop before the evaluation was done.
    """
    save(session, done)
    stopped_by = reason_to_end_of(session.run, done)
    if session.run.cfg.eval.rows and evaluation is None:
        evaluation = run_evaluation(session)
        if evaluation is None:
            stop_here(session, done)
        record(session, evaluation, done)
    wait_until_saved(session)
    conclude(session, evaluation, done, stopped_by)
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


def record(session: Session, evaluation: Evaluation, done: Progress) -> None:
    """Write down what an evaluation gave: evaluations.jsonl, scores for the best, sinks."""
    run = session.run
    if not run.ranks.is_first:
        return
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


def report(session: Session, evaluation: Evaluation, done: Progress) -> None:
    """Write what people read of a run that goes on: summary.json, predictions, report.html."""
    run = session.run
    if run.ranks.is_first:
        write_results(run.folder, run.cfg, evaluation, done.step, is_finished=False)


def conclude(
    session: Session, evaluation: Evaluation | None, done: Progress, stopped_by: str | None
) -> None:
    """The same of a run that is over, and say how it ended.

    stopped_by  why `train.stop_if` ended it before its last step
    """
    run = session.run
    if not run.ranks.is_first:
        return
    session.saver.tidy()  # before the report, which lists what is kept
    diverged = write_results(run.folder, run.cfg, evaluation, done.step, True, stopped_by)
    if stopped_by:
        say(
            f"train.stop_if ends the run after step {done.step}: {stopped_by}; its learning rates "
            f"were those of a run of {run.total_steps} steps"
        )
    how = f"diverged ({diverged})" if diverged else "finished"
    say(f"{how} after step {done.step}, see {run.folder.path / REPORT}")
