"""Training, to be read from top to bottom: open the run, build the engine, step, save, evaluate.

    rows -> shards -> packs -> this loop -> checkpoints

The loss of a step is the mean over the trained tokens of all its packs, whatever rank and round
they fall to: every rank knows how many there are (the index says so), sums its own losses, and
DeepSpeed's division by ranks and rounds is taken back.
"""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from phi3v.config import DeepSpeedConfig, RunConfig
from phi3v.data import Dataset
from phi3v.data.batch import model_inputs
from phi3v.data.loader import Loader, OnePack, Step
from phi3v.data.mixture import SIZES, Mixture, open_datasets
from phi3v.data.packing import Budget, Plan, check_fits
from phi3v.errors import ConfigError
from phi3v.evaluation.evaluate import Evaluation, evaluate, open_held_out
from phi3v.evaluation.generation import Generator
from phi3v.evaluation.models import check_model
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.model.execution import Execution, choose_execution
from phi3v.model.weights import WeightFiles, load_weights
from phi3v.training import zero
from phi3v.training.checkpoint import Progress, restore, save
from phi3v.training.console import Console
from phi3v.training.metering import Meter, sample_costs
from phi3v.training.optimizer import freeze, learning_rates, parameter_groups
from phi3v.training.profile import profiled
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
    dataset: Dataset | Mixture
    plan: Plan
    total_steps: int
    device: torch.device
    execution: Execution


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
    model.set_execution(run.execution)
    engine = zero.build_engine(model, parameter_groups(model, cfg), ds)
    done = restore(engine, run.folder.checkpoints)
    if ranks.is_first:
        print(run.execution, file=sys.stderr)
        data = describe_data(run.dataset)
        run.folder.write_origin(cfg, ds, data, ranks.world_size, asdict(run.execution))
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
    dataset = open_datasets(cfg.data.folders, "train", [part.weight for part in cfg.data.parts])
    if not len(dataset):
        raise ConfigError(
            f"{', '.join(cfg.data.folders)} has no rows in split 'train', so there is nothing to "
            "train on; prepare it with a smaller split.validation, or from more rows"
        )
    for part in dataset.datasets:
        check_model(part, cfg.model.path)
    if cfg.eval.rows:
        open_held_out(cfg.data.folders, cfg.eval)
    plan = plan_steps(cfg, ds, dataset)
    check_fits(plan, lambda index: dataset[index].id)
    steps = cfg.train.max_steps
    if steps is None:
        assert cfg.train.epochs is not None
        steps = plan.count(cfg.train.epochs)
    has_cuda = torch.cuda.is_available()
    device = torch.device("cuda", ranks.local_rank) if has_cuda else torch.device("cpu")
    execution = choose_execution(cfg.model, device, dtype_of(ds))
    return Run(cfg, ds, ranks, folder, dataset, plan, steps, device, execution)


def plan_steps(cfg: RunConfig, ds: DeepSpeedConfig, dataset: Dataset | Mixture) -> Plan:
    """The sequence of steps: which samples share a pack, and which packs a step."""
    config = Phi3VConfig.from_pretrained(cfg.model.path)
    return Plan(
        dataset.fingerprint,
        cfg.run.seed,
        dataset.tokens,
        dataset.views,
        sample_costs(config, dataset, cfg.data.cost, cfg.model.freeze),
        Budget(cfg.data.max_tokens, cfg.data.max_views, cfg.data.window),
        ds.train_batch_size,
        cfg.data.window_steps,
        dataset.parts,
    )


def load_model(cfg: RunConfig, ds: DeepSpeedConfig) -> Phi3VForCausalLM:
    """The model in training mode, in the JSON's precision, with frozen parts."""
    with torch.device("meta"):
        model = Phi3VForCausalLM(Phi3VConfig.from_pretrained(cfg.model.path))
    with WeightFiles(cfg.model.path) as files:
        if ds.zero_stage == 3:
            zero.load_partitioned(model, files, dtype_of(ds), ds)
        else:
            load_weights(model, files, dtype_of(ds))
    freeze(model, cfg.model.freeze)
    return model.train()


def dtype_of(ds: DeepSpeedConfig) -> torch.dtype:
    """What the JSON lets the model compute in."""
    return torch.bfloat16 if ds.bf16 else torch.float32


def run_steps(run: Run, engine: Any, done: Progress, tracker: Tracker) -> Progress:
    """Train until the last step; save and evaluate on the way."""
    cfg, ranks = run.cfg, run.ranks
    plan = OnePack(run.plan) if cfg.debug.overfit_one_pack else run.plan
    loader = Loader(run.dataset, plan, ranks.rank, ranks.world_size, run.device)
    meter = Meter(run.dataset, engine.module.config, cfg, run.ds, ranks.world_size, run.device)
    steps = loader.steps(done.position, cfg.train.epochs)
    console = Console(run.total_steps, done.step, ranks.is_first)
    while done.step < run.total_steps:
        began = time.perf_counter()
        step = next(steps)
        number = done.step + 1
        rates = learning_rates(number, run.total_steps, cfg)
        with profiled(run.folder.profile, number, cfg.debug.profile_steps, ranks.rank):
            loss, norm = train_step(run, engine, loader, step, rates)
        metrics: dict[str, Any] = {"step": number, "epoch": step.epoch, "loss": loss}
        metrics |= {"grad_norm": norm, "lr": rates}
        metrics |= meter.measure(step, time.perf_counter() - began)
        done = Progress(number, step.after)
        if ranks.is_first:
            run.folder.add_metrics(metrics)
        console.step(metrics)
        tracker.log(number, {"train": metrics})
        if number < run.total_steps:
            if number % cfg.checkpoint.every == 0:
                save(engine, run.folder.checkpoints, done, cfg.checkpoint.keep, ranks.is_first)
            if cfg.eval.rows and cfg.eval.every and number % cfg.eval.every == 0:
                report(run, run_evaluation(run, engine), done, tracker, is_finished=False)
    steps.close()
    console.close()
    return done


def train_step(
    run: Run, engine: Any, loader: Loader, step: Step, rates: dict[Any, float]
) -> tuple[float | None, float | None]:
    """One optimizer step: the mean loss over its trained tokens, and the gradient's norm."""
    trained = sum(int(run.dataset.label_tokens[pack].sum()) for pack in step.packs)
    undo = run.ranks.world_size * run.ds.accumulation  # what DeepSpeed will divide by
    zero.set_learning_rates(engine, rates)
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    for batch in loader.on_device(step.batches):
        loss = engine(**model_inputs(batch, run.dataset.view_settings, run.device))
        engine.backward(loss * (undo / max(1, trained)))
        engine.step()
        total += loss.detach().double()
    mean = float(zero.sum_over_ranks(total)) / max(1, trained)
    return _finite(mean), _finite(zero.total_norm(engine))


def _is_finished(run: Run) -> bool:
    summary = run.folder.read_summary() or {}
    return bool(summary.get("is_finished")) and summary["steps"] >= run.total_steps


def describe_data(dataset: Dataset | Mixture) -> dict[str, Any]:
    """What the run is trained on: folders, fingerprint, sizes (weights are in the recipe)."""
    return {
        "shards": ", ".join(str(part.folder) for part in dataset.datasets),
        "fingerprint": dataset.fingerprint,
        **{name: dataset.entry[name] for name in SIZES},
    }


def _finite(value: float) -> float | None:
    """None for what JSON cannot say."""
    return value if np.isfinite(value) else None


def run_evaluation(run: Run, engine: Any) -> Evaluation:
    """Gather the weights into a whole model on every rank, and share the held-out rows out."""
    cfg = run.cfg
    with torch.device("meta"):
        whole = Phi3VForCausalLM(engine.module.config).to(dtype_of(run.ds))
    whole = whole.to_empty(device=run.device)
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
        generator, cfg.data.folders, cfg.eval, ranks.rank, ranks.world_size, zero.gather_objects
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
