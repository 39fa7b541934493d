"""What no section can check alone: a recipe against itself, and against the DeepSpeed JSON.

    check(cfg, ds)

Also the one place that knows which metrics a pattern allows. A pattern names the fields of an
answer: "Product: {title}, Full Price: {price:float}" has the fields title and price, and with them
the metrics title_accuracy, price_mape and so on; see `metric_names`.
"""

from __future__ import annotations

import string

from phi3v.config.deepspeed import DeepSpeedConfig
from phi3v.config.names import nearest
from phi3v.config.schema import LR_FIELDS, MODULES, RunConfig
from phi3v.errors import ConfigError

FIELD_METRICS = ("accuracy", "exact_match", "exact_match_unseen")
"""Metrics of every field of a pattern, written FIELD_accuracy and so on."""

NUMBER_METRICS = ("mape",)
"""Metrics of fields that are numbers, {FIELD:float}."""


def check(cfg: RunConfig, ds: DeepSpeedConfig) -> None:
    """Refuse a recipe whose sections contradict each other or the DeepSpeed JSON.

    Raises: ConfigError naming the keys and both values.
    """
    _check_warmup(cfg)
    _check_freeze(cfg)
    _check_decay(cfg, ds)
    _check_metrics(cfg)


def pattern_fields(pattern: str) -> dict[str, type[str] | type[float]]:
    """List the fields of an answer's pattern with their types, in order.

    Example: "Product: {title}, Full Price: {price:float}" gives {"title": str, "price": float}.

    Raises: ConfigError if the pattern has no field, one twice, or one that is not {name} or
    {name:float}.
    """
    found: dict[str, type[str] | type[float]] = {}
    for name, kind in _placeholders(pattern):
        if not name.isidentifier() or kind not in ("", "float"):
            shown = f"{{{name}:{kind}}}" if kind else f"{{{name}}}"
            raise ConfigError(f"eval.pattern holds {shown}; write {{name}} or {{name:float}}")
        if name in found:
            raise ConfigError(f"eval.pattern names {{{name}}} twice; keep one")
        found[name] = float if kind else str
    if not found:
        raise ConfigError(f"eval.pattern must name a field, such as {{title}}, got {pattern!r}")
    return found


def metric_names(pattern: str | None) -> list[str]:
    """List the metrics that answers of a pattern can be measured by, or any answer without one."""
    names = ["exact_match"]
    if pattern is None:
        return names
    names.append("parse_rate")
    for field, kind in pattern_fields(pattern).items():
        metrics = FIELD_METRICS + (NUMBER_METRICS if kind is float else ())
        names += [f"{field}_{metric}" for metric in metrics]
    return names


def _placeholders(pattern: str) -> list[tuple[str, str]]:
    """Split a pattern into the name and format of each of its fields."""
    try:
        parts = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise ConfigError(f"eval.pattern cannot be read, got {pattern!r}: {error}") from None
    return [
        (name + (f"!{conversion}" if conversion else ""), kind or "")
        for _, name, kind, conversion in parts
        if name is not None
    ]


def _check_warmup(cfg: RunConfig) -> None:
    steps, warmup = cfg.train.max_steps, cfg.optim.warmup_steps
    if steps is not None and warmup >= steps:
        raise ConfigError(
            f"optim.warmup_steps {warmup} must be below train.max_steps {steps}; "
            f"use at most {steps - 1}"
        )


def _check_freeze(cfg: RunConfig) -> None:
    if set(cfg.model.freeze) == set(MODULES):
        raise ConfigError(
            f"model.freeze holds all modules, {', '.join(MODULES)}, so nothing is left to train; "
            "remove at least one"
        )
    for module in cfg.model.freeze:
        field = LR_FIELDS[module]
        rate = getattr(cfg.optim, field)
        if field != "lr" and rate is not None:
            raise ConfigError(
                f"optim.{field} is {rate} but model.freeze holds {module!r}; remove one of the two"
            )


def _check_decay(cfg: RunConfig, ds: DeepSpeedConfig) -> None:
    if cfg.optim.weight_decay and not ds.decouples_decay:
        raise ConfigError(
            f"optim.weight_decay {cfg.optim.weight_decay} is decoupled decay, but the "
            f"{ds.optimizer_type} of {ds.path} adds decay to the gradient; set optimizer.type to "
            "AdamW there, or optim.weight_decay to 0"
        )


def _check_metrics(cfg: RunConfig) -> None:
    known = metric_names(cfg.eval.pattern)
    for name in cfg.eval.metrics:
        if name not in known:
            raise ConfigError(f"eval.metrics holds {name!r}; {_explain(name, cfg.eval.pattern)}")


def _explain(name: str, pattern: str | None) -> str:
    """Say what a metric lacks: a pattern, a number, or the right spelling."""
    field, _, metric = name.rpartition("_")
    if pattern is None and _needs_pattern(name):
        return "it measures fields of the answer, so eval.pattern must name them"
    if pattern is not None and metric in NUMBER_METRICS and field in pattern_fields(pattern):
        return f"it measures numbers, so write {{{field}:float}} in eval.pattern {pattern!r}"
    return nearest(name, metric_names(pattern))


def _needs_pattern(name: str) -> bool:
    endings = tuple(f"_{metric}" for metric in FIELD_METRICS + NUMBER_METRICS)
    return name == "parse_rate" or name.endswith(endings)
