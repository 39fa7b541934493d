"""The keys that a DeepSpeed JSON may hold are those that the installed DeepSpeed reads."""

import inspect
import os
from pathlib import Path

import pytest
import torch

from phi3v.config.keys import OPTIMIZERS, SECTIONS, STAGE_KEYS, optimizer_keys

# What DeepSpeed would read and this project does not let it.
LEFT_OUT = {
    "zero_optimization": {
        "compute_grad_norm",
        "cpu_offload",
        "cpu_offload_param",
        "cpu_offload_use_pin_memory",
        "elastic_checkpoint",
        "leaf_module",
        "legacy_stage1",
        "load_from_fp32_weights",
        "override_module_apply",
        "pipeline_loading_checkpoint",
        "save_muon_momentum_buffer_in_memory",
        "stage3_gather_fp16_weights_on_model_save",
        "zenflow",
    },
}


@pytest.fixture(autouse=True)
def _accelerator() -> None:
    """DeepSpeed reads it when it is imported."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"


def fields(model: type) -> set[str]:
    """The keys of a section that DeepSpeed checks, by the names that its documentation uses."""
    return {field.alias or name for name, field in model.model_fields.items()}  # type: ignore[attr-defined]


def test_sections_hold_the_fields_of_deepspeed() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    models = {
        "bf16": DeepSpeedBF16Config,
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "comms_logger": CommsLoggerConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }
    for section, model in models.items():
        left_out = LEFT_OUT.get(section, set())
        assert left_out <= fields(model), section
        assert SECTIONS[section].keys() == fields(model) - left_out, section


def test_sections_that_deepspeed_does_not_check_hold_names_that_it_reads() -> None:
    import deepspeed

    root = Path(deepspeed.__file__).parent
    files = [*root.glob("runtime/*.py"), *root.glob("runtime/swap_tensor/*.py")]
    files += [root / "utils/config.py", *root.glob("runtime/model_checkpointing/*.py")]
    files += [*root.glob("profiling/*.py"), *root.glob("comm/*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    for section in ("", "data_types", "optimizer", "aio", "checkpoint", "flops_profiler", "timers"):
        for name in SECTIONS[section]:
            assert f'"{name}"' in text or f"'{name}'" in text, f"{section}.{name}"


def test_optimizers_take_their_keys() -> None:
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    popped = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}
    own = optimizer_keys("adamw", is_torch=False) - popped
    for optimizer in (FusedAdam, DeepSpeedCPUAdam):
        assert own <= inspect.signature(optimizer).parameters.keys()
    of_torch = optimizer_keys("adamw", is_torch=True) - popped
    assert of_torch <= inspect.signature(torch.optim.AdamW).parameters.keys()


def test_every_key_of_a_stage_or_an_optimizer_is_in_its_section() -> None:
    of_stages = {name for names in STAGE_KEYS.values() for name in names}
    assert of_stages <= SECTIONS["zero_optimization"].keys()
    prefixes = ("stage3_", "zero_", "allgather_")
    assert {key for key in SECTIONS["zero_optimization"] if key.startswith(prefixes)} <= of_stages
    taken = {key for name in OPTIMIZERS for torch in (0, 1) for key in optimizer_keys(name, torch)}
    assert taken == SECTIONS["optimizer.params"].keys()
