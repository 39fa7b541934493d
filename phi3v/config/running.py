"""Sections of a recipe on how a run runs: length, evaluation, saving, faults, records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phi3v.config.values import above_zero, at_least, distinct, filled
from phi3v.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StopIfSection:
    metric: str
    """`loss` of the held-out rows, or a name of `eval.metrics`."""

    patience: int | None = None
    """Evaluations in a row, without a value better than the best before them, after which the run
    ends; default: it does not for that."""

    min_delta: float = 0.0
    """What a value must be better by, more than this, to count as better; in the metric's unit, of
    a rate as a fraction."""

    above: float | None = None
    """The run ends after the first evaluation whose value is above this; a rate as a fraction."""

    below: float | None = None
    """The same for a value that is below this."""

    def __post_init__(self) -> None:
        filled(train__stop_if__metric=self.metric)
        at_least(1, train__stop_if__patience=self.patience)
        at_least(0, train__stop_if__min_delta=self.min_delta)
        if self.patience is None and self.above is None and self.below is None:
            raise ConfigError(
                "train.stop_if needs one of train.stop_if.patience, train.stop_if.above and "
                "train.stop_if.below, got none; to train to the last step set train.stop_if to null"
            )
        if self.min_delta and self.patience is None:
            raise ConfigError(
                f"train.stop_if.min_delta is {self.min_delta:g} without train.stop_if.patience, "
                "which it belongs to; set patience, or leave it out"
            )
        if self.above is not None and self.below is not None and self.above < self.below:
            raise ConfigError(
                f"train.stop_if.above is {self.above:g} and train.stop_if.below {self.below:g}, so "
                "that every value ends the run; exchange them, or leave one out"
            )


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    max_steps: int | None = None
    """Length of the run in optimizer steps; either this or `epochs`."""

    epochs: int | None = None
    """Length of the run in passes over the training samples; either this or `max_steps`."""

    stop_after: float | None = None
    """Seconds after whose end the run saves and stops with exit code 75, to be started again."""

    stop_if: StopIfSection | None = None
    """{metric, patience, min_delta, above, below}: the run ends before its last step, as a finished
    one, if an evaluation says so. Learning rates stay those of the whole run."""

    hang_timeout: float = 300.0
    """Seconds without any progress after which a rank writes its stacks and ends: longer than the
    longest step, or batch of an evaluation. A run whose nodes fail loses as long with each hang."""

    start_timeout: float = 1800.0
    """The same, where it is longer, for what comes once and takes its time: from the start of the
    process to the end of its first step, and until a checkpoint is read, converted or written."""

    def __post_init__(self) -> None:
        if (self.max_steps is None) == (self.epochs is None):
            both = f"both, {self.max_steps} and {self.epochs}; set the other to null"
            raise ConfigError(
                "exactly one of train.max_steps and train.epochs must be set, got "
                f"{'neither' if self.epochs is None else both}"
            )
        at_least(1, train__max_steps=self.max_steps, train__epochs=self.epochs)
        none = "leave it out to run without a limit"
        above_zero(none, train__stop_after=self.stop_after)
        above_zero("the default is 300", train__hang_timeout=self.hang_timeout)
        above_zero("the default is 1800", train__start_timeout=self.start_timeout)


@dataclass(frozen=True, kw_only=True)
class EvalSection:
    every: int = 0
    """Steps between evaluations; 0: only at the end."""

    at_start: bool = False
    """Whether the base is evaluated before the first step, so that curves begin at step 0."""

    rows: int = 256
    """Held-out rows that are answered; 0: no evaluation."""

    split: str = "validation"
    """Split of the dataset that is answered."""

    metrics: tuple[str, ...] = ("exact_match",)
    """exact_match, accuracy, anls, relaxed_accuracy, vqa_accuracy, rouge_l, bleu,
    teacher_forced_price_error; of answers that are JSON json_parse_rate, json_field_f1,
    json_field_accuracy, json_exact_match, json.PATH_accuracy; with a `pattern` parse_rate,
    FIELD_accuracy, FIELD_exact_match, FIELD_similarity of a text, FIELD_mae, FIELD_mape,
    FIELD_log_error of a number; module:function, a function of yours. `_unseen` after any of them
    counts only the rows whose value is in no training answer. docs/evaluation.md defines each."""

    pattern: str | None = None
    """What an answer looks like: "Product: {title}, Full Price: {price:float}"."""

    blind: bool = True
    """Answer the rows a second time with their images exchanged: what the images are worth."""

    max_new_tokens: int = 64
    """Tokens of one answer at most."""

    batch_rows: int = 32
    """Rows answered at once by one rank."""

    loss_rows: int | None = None
    """Held-out rows over which the loss is taken, evenly spaced; default: the whole split."""

    max_seconds: float | None = None
    """Seconds of one evaluation: when they are over no rank begins another batch, and rows without
    an answer are left out and counted; the loss may take half of them. Default: no limit."""

    def __post_init__(self) -> None:
        filled(eval__split=self.split, eval__pattern=self.pattern)
        distinct(eval__metrics=self.metrics)
        at_least(0, eval__every=self.every, eval__rows=self.rows)
        at_least(1, eval__max_new_tokens=self.max_new_tokens, eval__batch_rows=self.batch_rows)
        at_least(1, eval__loss_rows=self.loss_rows)
        above_zero("leave it out for no limit", eval__max_seconds=self.max_seconds)
        if self.at_start and not self.rows:
            raise ConfigError(
                "eval.at_start is true, but eval.rows is 0, so nothing is evaluated; set eval.rows "
                "above 0, or eval.at_start to false"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    every: int = 200
    """Steps between checkpoints; the last step is always saved."""

    keep: int = 3
    """Newest checkpoints that are kept; older ones are deleted, but for those of the next two."""

    keep_every: int = 0
    """Checkpoints of steps divisible by this are kept for good; 0: none are."""

    best: str | None = None
    """The checkpoint that evaluates best is kept: `loss`, or a name of `eval.metrics`."""

    def __post_init__(self) -> None:
        at_least(1, checkpoint__every=self.every, checkpoint__keep=self.keep)
        at_least(0, checkpoint__keep_every=self.keep_every)
        filled(checkpoint__best=self.best)


@dataclass(frozen=True, kw_only=True)
class FaultsSection:
    spike: float | None = None
    """A step whose loss is more than so many robust deviations above where those before it lead is
    skipped, 8 is a good choice; default: only steps without a finite loss and gradient are."""

    rollback_after: int = 3
    """Steps skipped in a row after which the run goes back to the last checkpoint before them, and
    leaves them out."""

    def __post_init__(self) -> None:
        above_zero("leave it out to skip no finite step", faults__spike=self.spike)
        at_least(1, faults__rollback_after=self.rollback_after)


@dataclass(frozen=True, kw_only=True)
class WandbSection:
    mode: Literal["offline", "online", "disabled"] = "offline"
    """offline writes to the run folder only; `wandb sync` uploads it later."""

    project: str = "phi3v"
    """Project under which the run appears."""

    entity: str | None = None
    """User or team that owns the project; default: that of the key."""

    name: str | None = None
    """Name of the run; default: that of its folder."""

    group: str | None = None
    """Runs of one group are shown together."""

    tags: tuple[str, ...] = ()
    """Words by which the run can be found."""

    log_checkpoint: Literal["none", "last", "best"] = "none"
    """Checkpoint that becomes an artifact when the run is done: its manifest, the recipe, and where
    its files lie; the files themselves stay there."""

    def __post_init__(self) -> None:
        filled(
            wandb__project=self.project,
            wandb__entity=self.entity,
            wandb__name=self.name,
            wandb__group=self.group,
        )
        distinct(wandb__tags=self.tags)


@dataclass(frozen=True, kw_only=True)
class TrackingSection:
    sinks: tuple[Literal["tensorboard", "json"], ...] = ()
    """Where else the records go, beside Weights & Biases. tensorboard: the run's folder
    `tensorboard`; json: a line for each record in its events.jsonl."""

    def __post_init__(self) -> None:
        distinct(tracking__sinks=self.sinks)


@dataclass(frozen=True, kw_only=True)
class DebugSection:
    deterministic: bool = False
    """Use only kernels that give the same bits each time; slower."""

    profile_steps: tuple[int, ...] = ()
    """Steps of which every rank writes a trace to the run's folder `profile`."""

    overfit_one_pack: bool = False
    """Train on the first pack alone, over and over: its loss must go to 0."""

    def __post_init__(self) -> None:
        distinct(debug__profile_steps=[str(step) for step in self.profile_steps])
        at_least(1, debug__profile_steps=min(self.profile_steps, default=1))
