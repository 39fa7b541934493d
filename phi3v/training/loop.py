"""Training, to be read from top to bottom: open the run, build the engine, step, save, evaluate.

    rows -> shards -> packs -> this loop -> checkpoints

The loss of a step is the mean over the trained tokens of all its packs, whatever rank and round
they fall to: every rank knows how many there are (the index says so), sums its own losses, and
DeepSpeed's division by ranks and rounds is taken back.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from phi3v.config import DeepSpeedConfig, RunConfig
from phi3v.data import Dataset
from phi3v.data.batch import model_inputs
from phi3v.data.loader import Loader, Step
from phi3v.data.packing import Budget, PackPlan, check_fits
from phi3v.evaluation.evaluate import Evaluation, evaluate, open_held_out
from phi3v.evaluation.generation import Generator
from phi3v.evaluation.models import check_model
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.model.weights import WeightFiles, load_weights
from phi3v.progress import progress
from phi3v.training import zero
from phi3v.training.checkpoint import Progress, restore, save
from phi3v.training.metering import Meter
from phi3v.training.optimizer import freeze, learning_rates, parameter_groups
from phi3v.training.ranks import Ranks
from phi3v.training.results import write_results
from phi3v.training.run_folder import RunFolder
from phi3v.training.tracking import Tracker


@dataclass(frozen=True)
class Run:
    """What stays the same while a run trains."""

    cfg: RunConfig
    ds: DeepSpeedConfig
    ranks: Ranks
    folder: RunFolder
    dataset: Dataset
    plan: PackPlan
    total_steps: int
    device: torch.device


def train(cfg: RunConfig, ds: DeepSpeedConfig, ranks: Ranks) -> None:
    """Train to the end, going on where an unfinished run stopped; all ranks call.

    Raises: ConfigError, ShardError or CheckpointError before the first step if anything does not
    fit together.
    """
    run = open_run(cfg, ds, ranks)
    if _is_finished(run):
        if ranks.is_first:
            print(f"{run.folder.path} is finished: {run.total_steps} steps; see summary.json")
        return
    zero.start_process_group()
    lock = zero.first_rank_does(run.folder.lock, ranks.is_first)
    if cfg.debug.deterministic:
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(cfg.run.seed)
    model = load_model(cfg, ds)
    engine = zero.build_engine(model, parameter_groups(model, cfg), ds)
    done = restore(engine, run.folder.checkpoints)
    if ranks.is_first:
        run.folder.write_origin(cfg, ds, describe_data(run.dataset), ranks.world_size)
        run.folder.keep_metrics(done.step)
    tracker = Tracker(cfg, run.folder.path, ranks.is_first)
    done = run_steps(run, engine, done, tracker)
    finish(run, engine, done, tracker)
    tracker.finish()
    zero.leave_together()
    if lock:
        lock.close()


def open_run(cfg: RunConfig, ds: DeepSpeedConfig, ranks: Ranks) -> Run:
    """Check everything that can be checked before anything slow starts."""
    folder = RunFolder(Path(cfg.run.out))
    folder.check_recipe(cfg, ds)
    dataset = Dataset(cfg.data.shards, "train")
    check_model(dataset, cfg.model.path)
    if cfg.eval.rows:
        open_held_out(cfg.data.shards, cfg.eval)
    budget = Budget(cfg.data.max_tokens, cfg.data.max_views, cfg.data.window)
    plan = PackPlan(dataset.fingerprint, cfg.run.seed, dataset.tokens, dataset.views, budget)
    check_fits(plan, lambda index: dataset[index].id)
    steps = cfg.train.max_steps
    if steps is None:
        assert cfg.train.epochs is not None
        steps = -(-plan.count(cfg.train.epochs) // ds.train_batch_size)
    device = torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else "cpu"
    return Run(cfg, ds, ranks, folder, dataset, plan, steps, torch.device(device))


def load_model(cfg: RunConfig, ds: DeepSpeedConfig) -> Phi3VForCausalLM:
    """The model in training mode, in the JSON's precision, with frozen parts and checkpointing."""
    dtype = torch.bfloat16 if ds.bf16 else torch.float32
    with torch.device("meta"):
        model = Phi3VForCausalLM(Phi3VConfig.from_pretrained(cfg.model.path))
    with WeightFiles(cfg.model.path) as files:
        if ds.zero_stage == 3:
            zero.load_partitioned(model, files, dtype, ds)
        else:
            load_weights(model, files, dtype)
    freeze(model, cfg.model.freeze)
    if cfg.model.checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def run_steps(run: Run, engine: Any, done: Progress, tracker: Tracker) -> Progress:
    """Train until the last step; save and evaluate on the way."""
    cfg, is_first = run.cfg, run.ranks.is_first
    loader = Loader(
        run.dataset, run.plan, run.ds.train_batch_size, run.ranks.rank, run.ranks.world_size
    )
    meter = Meter(run.dataset, engine.module.config, cfg, run.ds, run.ranks.world_size, run.device)
    steps = loader.steps(done.position, cfg.train.epochs)
    bar = progress(
        None, "train", "step", total=run.total_steps, initial=done.step, disable=not is_first
    )
    while done.step < run.total_steps:
        began = time.perf_counter()
        step = next(steps)
        number = done.step + 1
        rates = learning_rates(number, run.total_steps, cfg)
        loss, norm = train_step(run, engine, step, rates)
        metrics: dict[str, Any] = {"step": number, "epoch": step.epoch, "loss": loss}
        metrics |= {"grad_norm": norm, "lr": rates}
        metrics |= meter.measure(step, time.perf_counter() - began)
        done = Progress(number, step.after)
        if is_first:
            run.folder.add_metrics(metrics)
            bar.set_postfix_str(
                f"loss {loss:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s", False
            )
            bar.update()
        tracker.log(number, {"train": metrics})
        if number < run.total_steps:
            if number % cfg.checkpoint.every == 0:
                save(engine, run.folder.checkpoints, done, cfg.checkpoint.keep, is_first)
            if cfg.eval.rows and cfg.eval.every and number % cfg.eval.every == 0:
                report(run, run_evaluation(run, engine), done, tracker, is_finished=False)
    steps.close()
    bar.close()
    return done


def train_step(
    run: Run, engine: Any, step: Step, rates: dict[Any, float]
) -> tuple[float | None, float | None]:
    """One optimizer step: the mean loss over its trained tokens, and the gradient's norm."""
    trained = sum(int(run.dataset.label_tokens[pack].sum()) for pack in step.packs)
    undo = run.ranks.world_size * run.ds.accumulation  # what DeepSpeed will divide by
    zero.set_learning_rates(engine, rates)
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    for batch in step.batches:
        loss = engine(**model_inputs(batch, run.dataset.view_settings, run.device))
        engine.backward(loss * (undo / max(1, trained)))
        engine.step()
        total += loss.detach().double()
    mean = float(zero.sum_over_ranks(total)) / max(1, trained)
    return _finite(mean), _finite(zero.total_norm(engine))


def _is_finished(run: Run) -> bool:
    summary = run.folder.read_summary() or {}
    return bool(summary.get("is_finished")) and summary["steps"] >= run.total_steps


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """What the run is trained on: folder, fingerprint, sizes."""
    sizes = ("samples", "tokens", "label_tokens", "image_tokens", "views")
    return {
        "shards": str(dataset.folder),
        "fingerprint": dataset.fingerprint,
        **{name: dataset.entry[name] for name in sizes},
    }


def _finite(value: float) -> float | None:
    """None for what JSON cannot say."""
    return value if np.isfinite(value) else None


def run_evaluation(run: Run, engine: Any) -> Evaluation:
    """Gather the weights into a whole model on every rank, and share the held-out rows out."""
    cfg = run.cfg
    whole = Phi3VForCausalLM(engine.module.config).to(
        run.device, next(engine.module.parameters()).dtype
    )
    zero.copy_weights(engine.module, whole)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(cfg.model.path)
    generator = Generator(
        whole.eval(),
        tokenizer,
        run.dataset.view_settings,
        cfg.eval.max_new_tokens,
        cfg.eval.batch_rows,
    )
    ranks = run.ranks
    return evaluate(
        generator, cfg.data.shards, cfg.eval, ranks.rank, ranks.world_size, zero.gather_objects
    )


def finish(run: Run, engine: Any, done: Progress, tracker: Tracker) -> None:
    """Save the last checkpoint, evaluate, and write summary and report."""
    save(engine, run.folder.checkpoints, done, run.cfg.checkpoint.keep, run.ranks.is_first)
    evaluation = run_evaluation(run, engine) if run.cfg.eval.rows else None
    report(run, evaluation, done, tracker, is_finished=True)


def report(
    run: Run, evaluation: Evaluation | None, done: Progress, tracker: Tracker, is_finished: bool
) -> None:
    """Tell what was found: W&B, summary.json, predictions.jsonl, report.html."""
    if not run.ranks.is_first:
        return
    if evaluation:
        scores = {name: score.value for name, score in evaluation.scores.items()}
        tracker.log(done.step, {"eval": {"loss": evaluation.loss, **scores}})
        tracker.log_examples(done.step, evaluation.examples())
    write_results(run.folder, run.cfg, evaluation, done.step, is_finished)
