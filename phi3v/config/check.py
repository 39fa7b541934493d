"""What no section can check alone: a recipe against itself, and against the DeepSpeed JSON.

    check(cfg, ds)
    check_warmup(cfg, total_steps)    # when the data has told how long the run is

Metrics and their pattern are checked by `phi3v.evaluation.metrics`, which alone knows them.
"""

from __future__ import annotations

from phi3v.config.deepspeed import DeepSpeedConfig
from phi3v.config.schema import LR_FIELDS, MODULES, RunConfig
from phi3v.errors import ConfigError


def check(cfg: RunConfig, ds: DeepSpeedConfig) -> None:
    """Refuse a recipe whose sections contradict each other or the DeepSpeed JSON.

    Raises: ConfigError naming the keys and both values.
    """
    _check_freeze(cfg)
    _check_offload(cfg)
    _check_decay(cfg, ds)
    _check_best(cfg)
    _check_stop_if(cfg)


SMOKE_STEPS = 20
"""A run of so many steps at most, set by train.max_steps, is there to see that everything works:
nothing is said about its length, and its warm-up may be longer."""


def is_smoke_run(cfg: RunConfig) -> bool:
    """Whether a run is but to see that everything works; an epoch of few steps is none."""
    return cfg.train.max_steps is not None and cfg.train.max_steps <= SMOKE_STEPS


def check_warmup(cfg: RunConfig, total_steps: int) -> None:
    """Refuse a warm-up that is as long as the run: no step would have the learning rate.

    Raises: ConfigError naming both lengths.
    """
    warmup = cfg.optim.warmup(total_steps)
    if warmup and warmup >= total_steps and not is_smoke_run(cfg):
        raise ConfigError(
            f"optim.warmup_steps is {warmup:,} and the whole run has {total_steps:,} "
            f"step{'s' if total_steps > 1 else ''}, so that none would have the learning rate; set "
            "optim.warmup_steps=null optim.warmup_ratio=0.03, or train longer"
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
    if "vision" in cfg.model.freeze and cfg.optim.vision_layer_decay != 1:
        raise ConfigError(
            f"optim.vision_layer_decay is {cfg.optim.vision_layer_decay} but model.freeze holds "
            "'vision'; remove one of the two"
        )


def _check_offload(cfg: RunConfig) -> None:
    model = cfg.model
    if model.offload_activations and "full" not in (model.checkpointing, model.tower_checkpointing):
        raise ConfigError(
            "model.offload_activations is true, but checkpointing is "
            f"{model.checkpointing!r} and that of the tower {model.tower_checkpointing!r}; only "
            "full checkpointing keeps what can wait in the host's memory, so set it to full"
        )


def _check_decay(cfg: RunConfig, ds: DeepSpeedConfig) -> None:
    if cfg.optim.weight_decay and not ds.decouples_decay:
        raise ConfigError(
            f"optim.weight_decay {cfg.optim.weight_decay} is decoupled decay, but the "
            f"{ds.optimizer_type} of {ds.path} adds decay to the gradient; set optimizer.type to "
            "AdamW there, or optim.weight_decay to 0"
        )


def _check_best(cfg: RunConfig) -> None:
    best, every = cfg.checkpoint.best, cfg.checkpoint.every
    if best is None:
        return
    names = ("loss", *cfg.eval.metrics)
    if best not in names:
        raise ConfigError(
            f"checkpoint.best is {best!r}, which no evaluation gives; take one of "
            f"{', '.join(names)}, or add it to eval.metrics"
        )
    if not cfg.eval.rows:
        reason = "eval.rows is 0, so no step has a score; set it above 0"
    elif not cfg.eval.every:
        reason = (
            "eval.every is 0, so only the last step has a score; set eval.every to a multiple of "
            f"checkpoint.every {every}"
        )
    elif cfg.eval.every % every:
        reason = (
            f"eval.every {cfg.eval.every} is no multiple of checkpoint.every {every}, so steps are "
            f"evaluated that are not saved; set checkpoint.every to {cfg.eval.every}"
        )
    else:
        return
    raise ConfigError(f"checkpoint.best is {best!r}, but {reason}")


def _check_stop_if(cfg: RunConfig) -> None:
    rule = cfg.train.stop_if
    if rule is None:
        return
    names = ("loss", *cfg.eval.metrics)
    if rule.metric not in names:
        raise ConfigError(
            f"train.stop_if.metric is {rule.metric!r}, which no evaluation gives; take one of "
            f"{', '.join(names)}, or add it to eval.metrics"
        )
    for key, value in (("eval.rows", cfg.eval.rows), ("eval.every", cfg.eval.every)):
        if not value:
            raise ConfigError(
                f"train.stop_if asks for evaluations during training, but {key} is 0; set it above "
                "0, or train.stop_if to null"
            )
